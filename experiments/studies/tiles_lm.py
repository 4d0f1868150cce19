"""What tiles cost in perplexity: `experiments.lm` with 2 layers of width 256.

    python -m experiments.studies.tiles_lm --minutes 60

Free masks, and tiles of 8 x 8, 16 x 16, 32 x 32 and 1 x 32 in the blocks, at 90 and 95%, with
DST-EE, RigL and static masks: a queue of `experiments.lm` runs that skips what is recorded in
results/tiles_lm.jsonl, so that it can be stopped and continued; `--minutes` stops it by itself.
Then prints a table of perplexity, lower is better, and of the time of a step. `--table FILE` prints
a file of records again. About an hour and a half a seed on 2 CPU cores.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.studies.queue import Run, add_queue_options, lm_run, work_off
from experiments.studies.tiles import METHODS, SPARSITIES, TILES, name_of
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one

LAYERS, WIDTH = 2, 256
# RigL after the others of all seeds: on MNIST it came out as DST-EE did.
QUEUED = (("dst_ee", "static"), ("rigl",))
Runs = list[dict[str, Any]]


def queue(args: argparse.Namespace) -> list[Run]:
    """Every run, in order."""
    words = [f"--layers={LAYERS}", f"--width={WIDTH}", f"--steps={args.steps}"]
    words += ["--rescale", "--evaluations=4", f"--results={args.results}"]
    runs = []
    for methods, seed in itertools.product(QUEUED, range(args.seeds)):
        for method, sparsity, tiles in itertools.product(methods, SPARSITIES, TILES):
            own = [f"--sparsity={sparsity}", f"--method={method}"]
            own += [f"--every={args.every}"] if method != "static" else []
            own += ["--tiles", *map(str, tiles)] if tiles else []
            runs.append(lm_run(seed, *words, *own))
    return runs


def groups(runs: Runs) -> dict[str, Runs]:
    """The runs that can be compared, by their setting in words; static ones for each interval."""
    found = {}
    runs = [run | {"sha256": run["text"]["sha256"]} for run in runs]
    setting = ("sparsity", "layers", "width", "steps", "sha256")
    for (sparsity, layers, width, steps, sha256), rows in records.group(runs, *setting).items():
        static = [run for run in rows if run["method"] == "static"]
        moving = [run | run["options"] for run in rows if run["method"] != "static"]
        for (every,), some in records.group(moving, "every").items() or [((None,), [])]:
            words = f"{sparsity:.0%} sparse, {layers} layers of width {width}, {steps} steps"
            words += f", a mask update every {every}" if every else ""
            words += f", text {sha256}"
            found[words] = some + static
    return found


def cells(runs: Runs) -> dict[tuple[tuple[int, ...], str], Runs]:
    """The runs of each tile and method of a group, in the order of the study."""
    pairs = itertools.product(TILES, METHODS)
    found = {
        pair: [run for run in runs if (tuple(run["tiles"] or ()), run["method"]) == pair]
        for pair in pairs
    }
    return {pair: mine for pair, mine in found.items() if mine}


def seeds_of(runs: Runs) -> str:
    """How many seeds the cells have: '3', or '1/3' where some are still to come."""
    return "/".join(map(str, sorted({len(mine) for mine in cells(runs).values()})))


def step_ms(runs: Runs, tiles: Sequence[int]) -> float | None:
    """Milliseconds of an ordinary step in these tiles, the least of the runs, if one was timed."""
    mine = [run.get("step_ms") for run in runs if run["tiles"] == (list(tiles) or None)]
    return min((ms for ms in mine if ms is not None), default=None)


def table(runs: Runs) -> str:
    """A row for each tile: what is active, the perplexity of each method, and a step's time."""
    lines = []
    for setting, rows in groups(runs).items():
        found = cells(rows)
        lines.append(f"{setting}, {seeds_of(rows)} seeds, test perplexity of a byte\n")
        lines.append(f"| tiles | active | {' | '.join(METHODS)} | ms an ordinary step |")
        lines.append("| --- |" + " --- |" * (len(METHODS) + 2))
        for tiles in TILES:
            mine = [found.get((tiles, method), []) for method in METHODS]
            active = [run["density"] for cell in mine for run in cell]
            shown = [records.mean_sd([r["perplexity"] for r in c], 3) if c else "–" for c in mine]
            if active:
                ms = step_ms(rows, tiles)
                shown = [f"{statistics.mean(active):.1%}", *shown, f"{ms:.0f}" if ms else "–"]
                lines.append(f"| {name_of(tiles)} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "tiles_lm.jsonl", images=False)
    parser.add_argument("--steps", type=at_least_one, default=1000)
    parser.add_argument("--every", type=at_least_one, default=50, help="steps between mask updates")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
