"""What tiles cost in accuracy, and what they save in time: MNIST, an MLP with layers of 1024.

    python -m experiments.studies.tiles --data_dir DIR --epochs 5

Free masks, and tiles of 8 x 8, 16 x 16, 32 x 32 and 1 x 32, at 90 and 95%, with DST-EE, RigL and
static masks, and at 95% by the largest score in a tile and with other drop fractions; 3 seeds of a
run at once. A queue of `experiments.mlp` runs that skips what is recorded in results/tiles.jsonl,
so that it can be stopped and continued; `--minutes` stops it by itself. Then prints a table, of
accuracy and of the time of a step without the first epoch, in which programs are compiled.
`--table FILE` prints a file of records again. About 45 minutes on 2 CPU cores at 5 epochs.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from experiments.studies.queue import Run, add_queue_options, mlp_run, work_off
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one

TILES: tuple[tuple[int, ...], ...] = ((), (32, 32), (1, 32), (16, 16), (8, 8))
METHODS = ("dst_ee", "rigl", "static")
MOVING = ("dst_ee", "rigl")
SPARSITIES = (0.9, 0.95)
VARIANTS: dict[str, dict[str, Any]] = {  # by what is said of them
    "": {},
    ", by the largest score": {"tile_score": "largest"},
    ", drop fraction 0.1": {"drop_fraction": 0.1},
    ", drop fraction 0.5": {"drop_fraction": 0.5},
}
WIDTHS = ("1024", "1024")
BATCH = 128


def queue(args: argparse.Namespace) -> list[Run]:
    """Every run, in order."""

    def run(sparsity: float, tiles: Sequence[int], method: str, *more: str) -> Run:
        words = [f"--method={method}", f"--sparsity={sparsity}", f"--epochs={args.epochs}"]
        words += [f"--results={args.results}", f"--data_dir={args.data_dir}"]
        words += [f"--batch={BATCH}", "--widths", *WIDTHS, "--seeds", *map(str, range(args.seeds))]
        return mlp_run(*words, *(["--tiles", *map(str, tiles)] if tiles else []), *more)

    found = list(itertools.starmap(run, itertools.product(SPARSITIES, TILES, METHODS)))
    for variant in filter(None, VARIANTS.values()):
        more = [f"--{name}={value}" for name, value in variant.items()]
        of = itertools.product(SPARSITIES[-1:], filter(None, TILES), MOVING)
        found += [run(*setting, *more) for setting in of]
    return found


def name_of(tiles: Sequence[int]) -> str:
    """'32 x 32', or 'free'."""
    return " x ".join(map(str, tiles)) or "free"


def having(
    runs: Sequence[dict[str, Any]], tiles: Sequence[int], variant: str = ""
) -> list[dict[str, Any]]:
    """The runs with these tiles, of that variant."""
    asked = ({"tiles": list(tiles)} if tiles else {}) | VARIANTS[variant]
    of = ("tiles", *itertools.chain(*VARIANTS.values()))
    options = [
        {name: run["options"][name] for name in of if name in run["options"]} for run in runs
    ]
    return [run for run, found in zip(runs, options, strict=True) if found == asked]


def step_ms(runs: Sequence[dict[str, Any]]) -> float:
    """Milliseconds of a step, the least of some runs: other programs only make it longer."""
    return min(run["step_ms"] for run in runs)


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each tile: accuracy of each method, and the time of a step of all seeds."""
    lines = []
    for (sparsity, epochs), rows in records.group(runs, "sparsity", "epochs").items():
        seeds = len(rows[0]["seeds"])
        lines.append(f"{sparsity:.0%} sparse, {epochs} epochs, {seeds} seeds, test accuracy (%)\n")
        lines.append(f"| tiles | {' | '.join(METHODS)} | ms a step of {seeds} seeds |")
        lines.append("| --- |" + " --- |" * (len(METHODS) + 1))
        for tiles, variant in itertools.product(TILES, VARIANTS):
            mine = having(rows, tiles, variant)
            if variant and not mine:
                continue
            by_method = {run["method"]: run for run in mine}
            cells = [
                records.mean_sd(by_method[name]["accuracy"]) if name in by_method else "–"
                for name in METHODS
            ]
            # Steps of static masks are the shortest: without them, no time to compare.
            shown = f"{step_ms(mine):.1f}" if mine and not variant else "–"
            lines.append(f"| {name_of(tiles)}{variant} | {' | '.join(cells)} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "tiles.jsonl")
    parser.add_argument("--epochs", type=at_least_one, default=5)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
