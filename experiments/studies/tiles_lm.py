"""What tiles cost in perplexity: `experiments.lm` with 2 layers of width 256.

    python -m experiments.studies.tiles_lm --minutes 60

Free masks, and tiles of 8 x 8, 16 x 16, 32 x 32 and 1 x 32 in the blocks, at 90 and 95%, with
DST-EE, RigL and static masks. Seed by seed a queue of `experiments.lm` runs that skips what is
recorded in results/tiles_lm.jsonl, so that it can be stopped and continued; `--minutes` stops it
by itself. Then prints a table; `--table FILE` prints a file of records again. About an hour a
seed on 2 CPU cores.
"""

import argparse
import itertools
import statistics
from typing import Any

from experiments.studies.queue import Run, add_queue_options, lm_run, work_off
from experiments.studies.tiles import METHODS, SPARSITIES, TILES, name_of
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one

LAYERS, WIDTH = 2, 256
QUEUED = ("dst_ee", "static", "rigl")


def queue(args: argparse.Namespace) -> list[Run]:
    """Every run, in order."""
    words = [f"--layers={LAYERS}", f"--width={WIDTH}", f"--steps={args.steps}"]
    words += ["--rescale", "--evaluations=1", f"--results={args.results}"]
    runs = []
    for seed in range(args.seeds):
        for method, sparsity, tiles in itertools.product(QUEUED, SPARSITIES, TILES):
            own = [f"--sparsity={sparsity}", f"--method={method}"]
            own += ["--tiles", *map(str, tiles)] if tiles else []
            runs.append(lm_run(seed, *words, *own))
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each tile: what is active, and the perplexity of each method."""
    lines = []
    runs = [run | {"sha256": run["text"]["sha256"]} for run in runs]
    setting = ("sparsity", "width", "steps", "sha256")
    for (sparsity, width, steps, sha256), rows in records.group(runs, *setting).items():
        cells = {(tuple(run["tiles"] or ()), run["method"]): [] for run in rows}
        for run in rows:
            cells[tuple(run["tiles"] or ()), run["method"]].append(run)
        seeds = "/".join(map(str, sorted({len(cell) for cell in cells.values()})))
        lines.append(
            f"{sparsity:.0%} sparse, width {width}, {steps} steps, {seeds} seeds, text {sha256}, "
            "test perplexity of a byte; lower is better\n"
        )
        lines.append(f"| tiles | active | {' | '.join(METHODS)} |")
        lines.append("| --- |" + " --- |" * (len(METHODS) + 1))
        for tiles in TILES:
            mine = [cells.get((tiles, method), []) for method in METHODS]
            active = [run["density"] for cell in mine for run in cell]
            shown = [records.mean_sd([r["perplexity"] for r in c], 3) if c else "–" for c in mine]
            density = f"{statistics.mean(active):.1%}" if active else "–"
            lines.append(f"| {name_of(tiles)} | {density} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "tiles_lm.jsonl", images=False)
    parser.add_argument("--steps", type=at_least_one, default=1000)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
