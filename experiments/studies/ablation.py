"""What each option of DST-EE is worth: one changed at a time, on the digits.

    python -m experiments.studies.ablation --sparsity 0.98 --seeds 10

The base is the quickstart's setting; each row changes one option: c, eps, drop fraction, steps
between mask updates, last mask step, first counter, and regrowth of just-dropped weights. All
seeds of a setting train at once with `vmap`. Appends a line a run to results/ablation.jsonl and
prints the difference to the base, paired by seed, with its standard error. About 4 minutes on
2 CPU cores. `--table FILE` prints a file of records again.
"""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import quickstart
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one, existing
from experiments.training.progress import conclude, over

BASE: dict[str, Any] = {
    "c": 1e-3,
    "eps": 1.0,
    **quickstart.SCHEDULE,
    "counter_init": "masks",
    "regrow": False,
}
CHANGES: dict[str, list[Any]] = {
    "c": [0.0, 1e-4, 1e-2, 1e-1],
    "eps": [0.01, 0.1, 10.0],
    "drop_fraction": [0.1, 0.3, 0.7],
    "every": [25, 100, 200],
    "stop": [0.5, 0.75, 1.0],
    "counter_init": ["zeros"],
    "regrow": [True],
}


def table(runs: list[dict]) -> str:
    """A row a setting: accuracy, R, and the difference to the base with its standard error."""
    lines = []
    for (sparsity,), rows in records.group(runs, "sparsity").items():
        cells = records.group(rows, "option", "value")
        base = {run["seed"]: run["accuracy"] for run in cells["base", None]}
        lines.append(f"digits, {sparsity:.0%} sparse, test accuracy (%), {len(base)} seeds; base: ")
        lines[-1] += ", ".join(f"{k} = {v}" for k, v in BASE.items()) + "\n"
        lines.append("| option | value | accuracy | R | difference | standard error |")
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for (option, value), cell in cells.items():
            accuracy = records.mean_sd(run["accuracy"] for run in cell)
            explored = statistics.mean(run["R"] for run in cell)
            gains = [run["accuracy"] - base[run["seed"]] for run in cell if run["seed"] in base]
            compared = "|  |"
            if option != "base" and len(gains) > 1:
                error = statistics.stdev(gains) / len(gains) ** 0.5
                compared = f"{statistics.mean(gains):+.2f} | {error:.2f} |"
            shown = "" if value is None else value
            lines.append(f"| {option} | {shown} | {accuracy} | {explored:.3f} | {compared}")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sparsity", type=float, default=0.98)
    add("--seeds", type=at_least_one, default=10)
    add("--options", nargs="+", choices=[*CHANGES], default=[*CHANGES])
    add("--split", choices=["validation", "test"], default="test")
    add("--results", type=Path, default=records.RESULTS / "ablation.jsonl")
    add("--table", type=existing, help="print the table of a file of records, and leave")
    args = parser.parse_args(argv)
    if args.table:
        print(table(records.read(args.table)))
        return
    settings: list[tuple[str, Any]] = [("base", None)]
    settings += [(option, value) for option in args.options for value in CHANGES[option]]
    runs = []
    for option, value in over(settings, "ablation"):
        changed = BASE if option == "base" else BASE | {option: value}
        result = quickstart.train("dst_ee", args.sparsity, args.seeds, args.split, **changed)
        for seed in range(args.seeds):
            run = {
                "data": "digits",
                "split": args.split,
                "option": option,
                "value": value,
                "sparsity": args.sparsity,
                "seed": seed,
                "accuracy": float(result.accuracy[seed, -1]),
                "R": float(result.exploration[seed, -1]),
            }
            records.append(args.results, run)
            runs.append(run)
    print(table(runs))
    conclude(Console(), f"{len(settings)} settings, {args.seeds} seeds", record=args.results)


if __name__ == "__main__":
    main()
