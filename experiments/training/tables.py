"""Tables of records."""

import statistics

from experiments.training import records
from experiments.training.methods import METHODS


def accuracy_table(runs: list[dict]) -> str:
    """One row a method, one column a sparsity; dense runs fill the first."""
    lines = []
    keys = ("data", "model", "split", "rescale")
    for (data, model, split, rescale), rows in records.group(runs, *keys).items():
        sparsities = sorted({r["sparsity"] for r in rows if r["method"] != "dense"})
        cells = records.group(rows, "method", "sparsity")
        seeds = sorted({len(cell) for cell in cells.values()})
        epochs = {f"{r['epochs']} epochs" if "epochs" in r else f"{r['steps']} steps" for r in rows}
        lines.append(
            f"{data}, {model}{', rescaled' if rescale else ''}, {split} accuracy (%), "
            f"{', '.join(sorted(epochs))}, "
            f"{'/'.join(map(str, seeds))} seeds, last epoch (R: exploration degree)\n"
        )
        lines.append("| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |")
        lines.append("| --- |" + " --- |" * len(sparsities))
        for method in METHODS:
            row = []
            for sparsity in sparsities:
                cell = cells.get((method, 0.0 if method == "dense" else sparsity))
                if cell is None:
                    row.append("")
                    continue
                text = records.mean_sd(run["accuracy"] for run in cell)
                explored = statistics.mean(run["R"] for run in cell)
                row.append(text if method == "dense" else f"{text} (R {explored:.3f})")
            if any(row):
                lines.append(f"| {method} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)
