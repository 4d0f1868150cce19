"""How far a language model's loss jumps when masks move, and what a warm start does about it.

    python -m experiments.studies.spikes

`experiments.lm` with AdamW, 2 layers of width 64, 90% sparse, 1,000 steps, a mask update every
100: SET (random growth) and RigL, each without a scale and with those of `dstee_jax.scales`, 3
seeds. SET with `warm-up, own correction` is SMET's rule but for its drop fractions. The loss is
measured on the same held-out windows before each mask update, right after it, and 1 to 50 steps
later. Appends a line a run to results/spikes.jsonl, skips what is recorded there, and prints by how
much the loss was higher than before the update, in thousandths of a nat a byte, as a mean over
the updates and seeds. All of it takes about 20 minutes on 2 CPU cores.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dstee_jax import scales
from experiments import lm
from experiments.data import text as texts
from experiments.studies.queue import Run, add_queue_options, work_off
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one

METHODS = ("set", "rigl")
SCALES: dict[str, Any] = {
    "none": None,
    "warm-up": scales.warm_up(100),
    "own correction": scales.own_bias_correction(),
    "warm-up, own correction": scales.product(scales.warm_up(100), scales.own_bias_correction()),
    "density": scales.density(),
}
AFTER = (0, 1, 2, 5, 10, 20, 50)  # steps after a mask update, which changes no weight that stays
PROBE = 64  # windows that the loss is measured on
MODEL = ("--layers=2", "--width=64")


def run(args: argparse.Namespace, seed: int, scale: str, text: texts.Text) -> dict[str, Any]:
    """Train one seed, and measure the loss around each mask update; the record."""
    trainer = lm.Trainer(args, seed, scale=SCALES[scale])
    state = trainer.init()
    cut = texts.windows(text.validation[: PROBE * args.length], args.length, PROBE)
    probe = [x[0] for x in cut]

    def loss(state):
        return float(trainer.total_loss(state, *probe)) / int(probe[2].sum())

    before, jumps = 0.0, []
    for i, tokens in enumerate(lm.batches(args, text, seed), 1):
        if i in trainer.mask_steps:
            before, last = loss(state), i
            jumps.append([])
        state, _ = trainer.step(i, state, tokens)
        if jumps and i - last in AFTER:
            jumps[-1].append(round(1000 * (loss(state) - before), 3))
    jumps = [jump for jump in jumps if len(jump) == len(AFTER)]  # the last may be cut off
    return settings(args, seed, scale) | {
        "text": texts.describe(text),
        "perplexity": round(trainer.perplexity(state, text.test), 4),
        "jumps": jumps,
    }


def settings(args: argparse.Namespace, seed: int, scale: str) -> dict[str, Any]:
    """What a record says of its run."""
    return lm.settings(args, seed) | {"every": args.every, "scale": scale}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The rise of the loss by steps after an update, a row for each method and scale."""
    heads = " | ".join(["at once", *(f"+{n}" for n in AFTER[1:])])
    lines = [f"| method | scale | {heads} | highest | test perplexity |"]
    lines.append("| --- | --- |" + " --- |" * (len(AFTER) + 2))
    for (method, scale), some in records.group(runs, "method", "scale").items():
        jumps = np.array([run["jumps"] for run in some])  # (seeds, updates, times)
        means = [f"{x:+.1f}" for x in jumps.mean((0, 1))]
        highest = records.mean_sd(jumps.max(-1).mean(-1).tolist(), 1)
        found = records.mean_sd([run["perplexity"] for run in some], 3)
        lines.append(f"| {method} | {scale} | {' | '.join(means)} | {highest} | {found} |")
    return "\n".join(lines)


def queue(args: argparse.Namespace) -> list[Run]:
    """A run for each seed, method and scale."""
    words = [*MODEL, f"--steps={args.steps}", f"--every={args.every}"]
    found = []
    for seed in range(args.seeds):
        for method in METHODS:
            one = lm.parse([*words, f"--method={method}", "--quiet"])
            for scale in SCALES:
                load = functools.partial(texts.load, None, one.length)
                train = functools.partial(run, one, seed, scale)
                found.append(Run(args.results, settings(one, seed, scale), (), load, train))
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "spikes.jsonl", images=False)
    parser.add_argument("--steps", type=at_least_one, default=1000)
    parser.add_argument("--every", type=at_least_one, default=100)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    args = parser.parse_args(argv)
    if args.every <= AFTER[-1]:
        parser.error(f"--every {args.every} must be more than {AFTER[-1]}, the last step measured.")
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
