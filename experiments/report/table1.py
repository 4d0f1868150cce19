"""The paper's Table 1 from records: mean ± sd over seeds, the best in bold.

    python -m experiments.report.table1 results/methods_digits.jsonl
    python -m experiments.report.table1 results/cifar.jsonl --commands

Beside our figures stand the paper's own for the same network and dataset, or, where it has
none, for VGG-19 on CIFAR-10 (160 epochs): for orientation, not for comparison. A sparsity that
came out of training (STR) is given where it is not the one asked for; such a cell is never
the best. `--commands` adds the
command that made each row.
"""

import re
import statistics

from experiments.training import records
from experiments.training.arguments import Parser, existing
from experiments.training.methods import METHODS

# Test accuracy (%) at 90, 95 and 98% sparsity, from the paper's Table 1 (160 epochs).
# Its RigL is RigL in ITOP's setting.
PAPER = {
    ("vgg19", "cifar10"): {
        "dense": ("93.85 ± 0.05",) * 3,
        "snip": ("93.63", "93.43", "92.05"),
        "grasp": ("93.30", "93.04", "92.19"),
        "synflow": ("93.35", "93.45", "92.24"),
        "str": ("93.73", "93.27", "92.21"),
        "sis": ("93.99", "93.31", "93.16"),
        "deep_r": ("90.81", "89.59", "86.77"),
        "set": ("92.46", "91.73", "89.18"),
        "rigl_itop": ("93.38 ± 0.11", "93.06 ± 0.09", "91.98 ± 0.09"),
        "dst_ee": ("93.84 ± 0.09", "93.53 ± 0.08", "92.55 ± 0.08"),
    },
    ("vgg19", "cifar100"): {
        "dense": ("73.43 ± 0.08",) * 3,
        "snip": ("72.84", "71.83", "58.46"),
        "grasp": ("71.95", "71.23", "68.90"),
        "synflow": ("71.77", "71.72", "70.94"),
        "str": ("71.93", "71.14", "69.89"),
        "sis": ("72.06", "71.85", "71.17"),
        "deep_r": ("66.83", "63.46", "59.58"),
        "set": ("72.36", "69.81", "65.94"),
        "rigl_itop": ("73.13 ± 0.28", "72.14 ± 0.15", "69.82 ± 0.09"),
        "dst_ee": ("74.27 ± 0.18", "73.15 ± 0.12", "70.80 ± 0.15"),
    },
    ("resnet50", "cifar10"): {
        "dense": ("94.75 ± 0.01",) * 3,
        "snip": ("92.65", "90.86", "87.21"),
        "grasp": ("92.47", "91.32", "88.77"),
        "synflow": ("92.49", "91.22", "88.82"),
        "str": ("92.59", "91.35", "88.75"),
        "sis": ("92.81", "91.69", "90.11"),
        "rigl_itop": ("94.45 ± 0.43", "93.86 ± 0.25", "93.26 ± 0.22"),
        "dst_ee": ("94.96 ± 0.23", "94.72 ± 0.18", "94.20 ± 0.08"),
    },
    ("resnet50", "cifar100"): {
        "dense": ("78.23 ± 0.18",) * 3,
        "snip": ("73.14", "69.25", "58.43"),
        "grasp": ("73.28", "70.29", "62.12"),
        "synflow": ("73.37", "70.37", "62.17"),
        "str": ("73.45", "70.45", "62.34"),
        "sis": ("73.81", "70.62", "62.75"),
        "rigl_itop": ("76.50 ± 0.33", "76.03 ± 0.34", "75.06 ± 0.27"),
        "dst_ee": ("78.15 ± 0.17", "77.54 ± 0.25", "75.68 ± 0.11"),
    },
}
SPARSITIES = (0.9, 0.95, 0.98)


def table(runs: list[dict], paper: dict[str, tuple[str, ...]]) -> str:
    """Rows of methods, columns of sparsities, of runs of one network on one dataset."""
    cells = records.group(runs, "method", "sparsity")
    columns = [s for s in SPARSITIES if any((m, s) in cells for m in METHODS)]
    mean = {key: statistics.mean(run["accuracy"] for run in cell) for key, cell in cells.items()}
    out = {key: 1 - statistics.mean(run["density"] for run in cell) for key, cell in cells.items()}

    def kept(method: str, sparsity: float) -> bool:
        """Whether the sparsity that came out is the one asked for."""
        return abs(out[method, sparsity] - sparsity) <= 0.002

    best = {
        s: max((v, m) for (m, at), v in mean.items() if at == s and m != "dense" and kept(m, s))[1]
        for s in columns
    }
    head = " | ".join(f"{s:.0%} | paper {s:.0%}" for s in columns)
    lines = [f"| method | {head} |", "| --- |" + " --- | --- |" * len(columns)]
    for method in METHODS:
        if not any(m == method for m, _ in cells):
            continue
        row = []
        for s in columns:
            cell = cells.get((method, 0.0 if method == "dense" else s), [])
            text = records.mean_sd(run["accuracy"] for run in cell) if cell else ""
            if best[s] == method:
                text = f"**{text}**"
            if cell and method != "dense" and not kept(method, s):
                text += f" (at {out[method, s]:.1%})"
            row += [text, paper.get(method, ("",) * 3)[SPARSITIES.index(s)]]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def commands(runs: list[dict]) -> str:
    """The command of each method's runs, with its seeds, data directory left out."""
    lines = ["| method | command | commit | device |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        for command in dict.fromkeys(run["command"] for run in mine):
            run = next(run for run in mine if run["command"] == command)
            shown = re.sub(r" --(quiet|record)\b| --note '[^']*'", "", command)
            lines.append(f"| {method} | `{shown}` | {run['commit']} | {run['device']} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=existing)
    parser.add_argument("--commands", action="store_true")
    args = parser.parse_args(argv)
    runs = [
        {"dataset": run["data"], "rescale": False} | run
        for f in args.files
        for run in records.read(f)
    ]
    runs = [run for run in runs if run["split"] == "test" and not run["rescale"]]
    for (data, model, dataset), rows in records.group(runs, "data", "model", "dataset").items():
        own = PAPER.get((model, dataset))
        length = {f"{r['epochs']} epochs" if "epochs" in r else f"{r['steps']} steps" for r in rows}
        seeds = sorted({len(cell) for cell in records.group(rows, "method", "sparsity").values()})
        print(
            f"{data}, {model}, test accuracy (%), {', '.join(sorted(length))}, "
            f"{'/'.join(map(str, seeds))} seeds, last epoch; paper: "
            f"{'the same' if own else 'VGG-19, CIFAR-10'}\n"
        )
        print(table(rows, own or PAPER["vgg19", "cifar10"]) + "\n")
        if args.commands:
            print(commands(rows) + "\n")


if __name__ == "__main__":
    main()
