"""How much there is to choose among tiles: why moving them gains less than moving weights.

    python -m experiments.studies.tile_choice

A round drops the fifth of a layer's active tiles that is smallest, and grows as many inactive ones
of largest gradient. `experiments.lm` as `tiles_lm` trains it, 90% sparse, static masks; after 300
steps, what share of the squared norm of the weights would be lost, and what share of that of the
inactive weights' gradient would be gained. If all tiles were alike, the first would be 0.2 and the
second the share of the inactive tiles that grow, 0.02; and how many of those would grow by another
batch's gradient too. Masks do not move. Appends a line a run to results/tile_choice.jsonl, skips
what is recorded there, and prints means and deviations of 3 seeds. About 15 minutes on 2 CPU cores.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import dstee_jax as dstee
from experiments import lm
from experiments.data import text as texts
from experiments.studies.queue import Run, add_queue_options, work_off
from experiments.studies.tiles import TILES, name_of
from experiments.studies.tiles_lm import LAYERS, WIDTH
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one

FRACTION = 0.2  # of the active tiles
MEASURES = {
    "dropped": "squared norm of the dropped",
    "grown": "squared gradient of the grown",
    "again": "grown by another batch too",
}


def of_tiles(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sums of magnitudes and of squares over what a kernel's mask has one value for.

    Args:
      x: a kernel (layers, inputs, outputs) for a mask of tiles, or of any shape for one of weights.
      mask: (layers, rows, columns), or of the shape of `x`.

    Returns:
      float64 (2, *mask.shape).
    """
    both = np.stack([np.abs(x), np.square(x)]).astype(np.float64)
    if x.shape == mask.shape:
        return both
    layers, rows, columns = mask.shape
    return both.reshape(2, layers, rows, x.shape[1] // rows, columns, -1).sum((3, 5))


def choice(mask: np.ndarray, weight: np.ndarray, grads: Sequence[np.ndarray]) -> np.ndarray:
    """What a round would choose in one layer.

    Args:
      mask: bool, of tiles (rows, columns).
      weight: of the shape of `mask`, as all that follow: (sum of magnitudes, sum of squares) of
        each tile, float64 (2, rows, columns).
      grads: the same of the gradients of two batches.

    Returns:
      Squared norm of the dropped and of all active tiles, squared gradient of the grown and of
      all inactive ones, tiles that the second batch grows too and all that grow, float64 (6,).
    """
    k = int(FRACTION * mask.sum())
    size, square = weight[:, mask]
    lowest = np.argsort(size)[:k]
    (first, gained), (second, _) = (grad[:, ~mask] for grad in grads)
    highest, other = (np.argsort(-x)[:k] for x in (first, second))
    again = len(np.intersect1d(highest, other))
    pairs = (square[lowest].sum(), square.sum(), gained[highest].sum(), gained.sum(), again, k)
    return np.float64(pairs)


def run(args: argparse.Namespace, seed: int, after: int, text: texts.Text) -> dict[str, Any]:
    """Train one seed for a while, and see what a round would choose; the record."""
    trainer = lm.Trainer(args, seed)
    state, batches = trainer.init(), lm.batches(args, text, seed)
    for i in range(1, after + 1):
        state, _ = trainer.step(i, state, next(batches))
    found = [trainer.dense_gradient(state, next(batches)) for _ in range(2)]
    masks = dstee.trees.mask_leaves(dstee.get_state(state[2]).masks, found[0][0])
    leaves = map(jax.tree.leaves, (found[0][0], found[0][1], found[1][1]))
    total = np.zeros(6)
    for mask, *arrays in zip(masks, *leaves, strict=True):
        if dstee.trees.is_dense(mask):
            continue
        mask = np.asarray(mask)
        sums = [of_tiles(np.asarray(x), mask) for x in arrays]
        for i in range(len(mask)):
            weight, *grads = (x[:, i] for x in sums)
            total += choice(mask[i], weight, grads)
    shares = total[::2] / total[1::2]
    return settings(args, seed, after) | {
        "text": texts.describe(text),
        **dict(zip(MEASURES, np.round(shares, 5).tolist(), strict=True)),
    }


def settings(args: argparse.Namespace, seed: int, after: int) -> dict[str, Any]:
    """What a record says of its run."""
    return lm.settings(args, seed) | {"after": after, "fraction": FRACTION}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each tile, in percent."""
    lines = [f"| tiles | {' | '.join(MEASURES.values())} |", "| --- |" + " --- |" * len(MEASURES)]
    rows = [run | {"name": name_of(run["tiles"] or ())} for run in runs]
    for (name,), some in records.group(rows, "name").items():
        found = [records.mean_sd([100 * run[m] for run in some], 1) for m in MEASURES]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines)


def queue(args: argparse.Namespace) -> list[Run]:
    """A run for each seed and tile."""
    words = [f"--layers={LAYERS}", f"--width={WIDTH}", "--steps=1000", "--rescale", "--quiet"]
    found = []
    for seed in range(args.seeds):
        for tiles in TILES:
            own = ["--tiles", *map(str, tiles)] if tiles else []
            one = lm.parse([*words, "--method=static", *own])
            load = functools.partial(texts.load, None, one.length)
            train = functools.partial(run, one, seed, args.after)
            found.append(Run(args.results, settings(one, seed, args.after), (), load, train))
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "tile_choice.jsonl", images=False)
    parser.add_argument("--after", type=at_least_one, default=300, help="steps of training")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
