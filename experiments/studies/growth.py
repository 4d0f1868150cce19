"""What each rule grows, and what becomes of it: MNIST at 98%, the network of `experiments.mlp`.

    python -m experiments.studies.growth --data_dir DIR

RigL, RigL that may not regrow what it has just dropped, and DST-EE at two c, 4 seeds each, 40
epochs. Of the weights that a round grows, in percent of all grown in training, by method:

* new: never active before;
* back: dropped in the round before;
* dead: of the first layer, from a pixel that is the same in all training images (its gradient is
  zero: nothing will ever move the weight);
* stay: still active a round later; last: active at the end;

All rules are asked to move as many weights: where just-dropped weights may grow at once, those that
come straight back are not among the grown. Appends a line a method to results/growth.jsonl, skips
what is recorded there, and prints the table. About 4 minutes a method on 2 CPU cores.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import dstee_jax as dstee
from experiments import mlp
from experiments.studies.length import ROWS, name_of
from experiments.studies.queue import Run, add_queue_options, work_off
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one
from experiments.training.epochs import in_segments

METHODS = ("RigL", "RigL, no regrowth", "DST-EE, c = 0.001", "DST-EE, c = 0.01")
SHARES = ("new", "back", "dead", "stay", "last")


class Round:
    """Masks before and after a round, and counters before; of all leaves of one seed, flat."""

    def __init__(self, before: dstee.SparseState, after: dstee.SparseState, seed: int):
        flat = [
            np.concatenate([np.asarray(x[seed]).reshape(-1) for x in jax.tree.leaves(tree)])
            for tree in (before.masks, after.masks, before.counters)
        ]
        self.grown, self.dropped = flat[1] & ~flat[0], flat[0] & ~flat[1]
        self.new = self.grown & (flat[2] == 0)
        self.after = flat[1]


def counted(rounds: Sequence[Round], last: np.ndarray, dead: np.ndarray) -> dict[str, float]:
    """Shares of what the rounds of one seed grew.

    Args:
      rounds: in order.
      last: bool, the mask at the end.
      dead: bool, weights whose input never changes.
    """
    grown = sum(int(r.grown.sum()) for r in rounds)
    pairs = list(itertools.pairwise(rounds))
    found = {
        "new": sum(int(r.new.sum()) for r in rounds),
        "back": sum(int((b.grown & a.dropped).sum()) for a, b in pairs),
        "dead": sum(int((r.grown & dead).sum()) for r in rounds),
        "stay": sum(int((a.grown & b.after).sum()) for a, b in pairs),
        "last": sum(int((r.grown & last).sum()) for r in rounds),
    }
    return {"grown": grown} | {name: 100 * n / grown for name, n in found.items()}


def run(args: argparse.Namespace, arrays: Any) -> dict[str, Any]:
    """Train all seeds of a method, and count what it grows; the record."""
    train, held_out = jax.device_put(arrays)
    trainer = mlp.Trainer(args, train[0].shape)
    state = trainer.init(train)
    rounds: list[list[Round]] = [[] for _ in args.seeds]
    per_epoch = trainer.steps_per_epoch
    for epoch in range(args.epochs):
        order = trainer.order(epoch)

        def steps(state, begin, end, mask_step, order=order):
            before = jax.device_get(dstee.get_state(state.opt_state)) if mask_step else None
            state, loss = trainer.steps(state, order, begin, end, train, mask_step)
            if mask_step:
                after = jax.device_get(dstee.get_state(state.opt_state))
                for i, mine in enumerate(rounds):
                    mine.append(Round(before, after, i))
            return state, loss

        state, _ = in_segments(steps, state, epoch * per_epoch, per_epoch, trainer.mask_steps)
    hits, _, explored = jax.device_get(trainer.evaluate(state, held_out))
    pixels = train[0].reshape(len(train[0]), -1)
    constant = np.asarray(pixels.min(0) == pixels.max(0))
    masks = jax.device_get(dstee.get_state(state.opt_state).masks)
    first, *rest = (x[0] for x in jax.tree.leaves(masks))
    dead = np.concatenate(
        [np.repeat(constant, first.shape[1]), *(np.zeros(x.size, bool) for x in rest)]
    )
    counts = [counted(mine, mine[-1].after, dead) for mine in rounds]
    return mlp.settings(args) | {
        "data": args.dataset,
        "accuracy": (100 * hits / len(held_out[0])).tolist(),
        "R": explored.tolist(),
        "constant_pixels": float(constant.mean()),
        **{name: [count[name] for count in counts] for name in ("grown", *SHARES)},
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each method."""
    lines = ["| method | accuracy | R | grown | " + " | ".join(f"{name}, %" for name in SHARES)]
    lines[0] += " |"
    lines.append("| --- |" + " --- |" * (3 + len(SHARES)))
    for run in runs:
        cells = [records.mean_sd(run["accuracy"]), f"{np.mean(run['R']):.3f}"]
        cells += [f"{np.mean(run['grown']):,.0f}"]
        cells += [records.mean_sd(run[name], 1) for name in SHARES]
        lines.append(f"| {name_of(run)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def queue(args: argparse.Namespace) -> list[Run]:
    """A run for each method."""
    shared = [f"--sparsity={args.sparsity}", f"--epochs={args.epochs}", "--quiet"]
    shared += [f"--data_dir={args.data_dir}", "--seeds", *map(str, range(args.seeds))]
    parsed = [mlp.parse([*shared, *ROWS[name]]) for name in METHODS]
    return [
        Run(
            args.results,
            mlp.settings(one),
            ("mnist",),
            functools.partial(mlp.load, one),
            functools.partial(run, one),
        )
        for one in parsed
    ]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "growth.jsonl")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--epochs", type=at_least_one, default=40)
    parser.add_argument("--seeds", type=at_least_one, default=4)
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
