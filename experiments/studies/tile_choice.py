"""How much there is to choose among tiles: why moving them gains less than moving weights.

    python -m experiments.studies.tile_choice

`experiments.lm` as `tiles_lm` trains it, 90% sparse, with RigL and its first mask update at step
300, where about a fifth of the active tiles may go. What does it drop, and what does it
grow? Weights that it drops, against the average active one: their mean square, as a share of the
average's. Weights that it grows, against the average inactive one: the mean square of their
gradient, as a multiple of the average's. If all tiles were alike, both would be 1. Appends a line a
run to results/tile_choice.jsonl, skips what is recorded there, and prints means and deviations of
3 seeds. About 15 minutes on 2 CPU cores.
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

STEPS, UPDATE = 1000, 300  # of the schedule; the mask update, with which a run ends
MEASURES = {
    "exchanged": "exchanged, of the active (%)",
    "dropped": "mean square of the dropped / of the active",
    "grown": "mean squared gradient of the grown / of the inactive",
}


def squares(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sums of squares over what each value of a kernel's mask stands for.

    Args:
      x: a kernel (layers, inputs, outputs) for a mask of tiles, or of any shape for one of weights.
      mask: (layers, rows, columns), or of the shape of `x`.

    Returns:
      float64, of the shape of `mask`.
    """
    found = np.square(x, dtype=np.float64)
    if found.shape == mask.shape:
        return found
    layers, rows, columns = mask.shape
    return found.reshape(layers, rows, x.shape[1] // rows, columns, -1).sum((2, 4))


def compared(rows: Sequence[tuple[np.ndarray, ...]]) -> dict[str, float]:
    """What a round dropped against the active, and what it grew against the inactive.

    Args:
      rows: for each kernel its mask before and after the round, and the squares of its weights
        and of its gradient before it, all of one shape.
    """
    before, after, weights, grads = (
        np.concatenate([row[i].ravel() for row in rows]) for i in range(4)
    )
    dropped, grown = before & ~after, after & ~before
    if not dropped.any():
        raise ValueError("nothing was exchanged: each column has one tile; take smaller ones.")
    return {
        "exchanged": round(float(100 * dropped.sum() / before.sum()), 3),
        "dropped": round(float(weights[dropped].mean() / weights[before].mean()), 5),
        "grown": round(float(grads[grown].mean() / grads[~before].mean()), 5),
    }


def run(args: argparse.Namespace, seed: int, text: texts.Text) -> dict[str, Any]:
    """Train one seed until its first mask update, and see what that chooses; the record."""
    trainer = lm.Trainer(args, seed)
    state = trainer.init()
    for i, tokens in enumerate(lm.batches(args, text, seed), 1):
        if i == UPDATE:
            break
        state, loss = trainer.step(i, state, tokens)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} after step {i - 1}.")
    dense = trainer.dense(state)
    arrays = [jax.device_get(x) for x in (dense[0], trainer.gradient(dense, tokens))]
    masks = [jax.device_get(dstee.get_state(state[2]).masks)]
    state, _ = trainer.step(UPDATE, state, tokens)
    masks.append(jax.device_get(dstee.get_state(state[2]).masks))
    pairs = [dstee.trees.mask_leaves(mask, arrays[0]) for mask in masks]
    rows = [
        (old, new, squares(weight, old), squares(grad, old))
        for old, new, weight, grad in zip(*pairs, *map(jax.tree.leaves, arrays), strict=True)
        if not dstee.trees.is_dense(old)
    ]
    return lm.settings(args, seed) | {"text": texts.describe(text)} | compared(rows)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each tile."""
    lines = [f"| tiles | {' | '.join(MEASURES.values())} |", "| --- |" + " --- |" * len(MEASURES)]
    rows = [run | {"name": name_of(run["tiles"] or ())} for run in runs]
    for (name,), some in records.group(rows, "name").items():
        found = [records.mean_sd([run[measure] for run in some]) for measure in MEASURES]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines)


def queue(args: argparse.Namespace) -> list[Run]:
    """A run for each seed and tile."""
    words = [f"--layers={LAYERS}", f"--width={WIDTH}", f"--steps={STEPS}", "--rescale", "--quiet"]
    words += ["--method=rigl", "--sparsity=0.9", f"--every={UPDATE}"]
    found = []
    for seed in range(args.seeds):
        for tiles in TILES:
            one = lm.parse([*words, *(["--tiles", *map(str, tiles)] if tiles else [])])
            load = functools.partial(texts.load, None, one.length)
            train = functools.partial(run, one, seed)
            found.append(Run(args.results, lm.settings(one, seed), (), load, train))
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "tile_choice.jsonl", images=False)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
