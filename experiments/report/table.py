"""Markdown table of recorded runs: mean ± standard deviation over seeds, last epoch.

    python -m experiments.report.table results/digits.jsonl
    python -m experiments.report.table results/cifar.jsonl --pairs

`--pairs` adds what one method gains over another with the same seeds: the mean difference and
its standard error.
"""

import statistics

from experiments.training import records
from experiments.training.arguments import Parser, existing
from experiments.training.tables import accuracy_table

PAIRS = [("set", "static"), ("rigl", "set"), ("dst_ee", "rigl")]


def pair_table(runs: list[dict]) -> str:
    """Differences between methods, paired by seed."""
    lines = [
        "| data | sparsity | pair | mean difference | standard error |",
        "| --- | --- | --- | --- | --- |",
    ]
    cells = records.group(runs, "data", "rescale", "sparsity")
    for (data, rescale, sparsity), rows in sorted(cells.items()):
        by = {(r["method"], r["seed"]): r["accuracy"] for r in rows}
        seeds = sorted({r["seed"] for r in rows})
        for better, worse in PAIRS:
            gains = [
                by[better, s] - by[worse, s] for s in seeds if {(better, s), (worse, s)} <= set(by)
            ]
            if len(gains) > 1:
                error = statistics.stdev(gains) / len(gains) ** 0.5
                mean = statistics.mean(gains)
                pair = f"{better} − {worse}"
                name = f"{data}, rescaled" if rescale else data
                lines.append(f"| {name} | {sparsity:.0%} | {pair} | {mean:+.2f} | {error:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=existing)
    parser.add_argument("--pairs", action="store_true")
    args = parser.parse_args(argv)
    recorded = [run for path in args.files for run in records.read(path)]
    runs = [{"rescale": False} | one for run in recorded for one in records.by_seed(run)]
    print(accuracy_table(runs))
    if args.pairs:
        print(pair_table(runs))


if __name__ == "__main__":
    main()
