"""Figure 1: inactive weights that become important, and which growth rule ignores them.

    python -m experiments.studies.figure1 --model vgg19 --data_dir DIR

A sparse network is trained to step 1000 with each rule, and a dense copy from the same start to
step 2000. Inactive are the weights outside the mask at step 1000. Important are those of them
that are among the layer's k largest inactive magnitudes of the dense copy at step 2000, with k
the number of weights that the layer grows at step 1000. Ignored are the important ones that the
rule does not grow: those not among the k best by |gradient| (RigL's rule), or by the acquisition
score (DST-EE's). Appends the share of each layer to results/figure1.jsonl, which
`experiments.report.figures figure1` draws. `--model small` takes 3 minutes on 2 CPU cores; VGG-19
is for a GPU. The paper's figure is VGG-19 on CIFAR-100: pass `--dataset cifar100`.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dstee_jax as dstee
from dstee_jax import scores, trees
from experiments import cifar
from experiments.data import cifar as data
from experiments.training import records
from experiments.training.arguments import Parser
from experiments.training.progress import conclude, over

AT, LATER = 1000, 2000
SCORES = {"rigl": scores.gradient(), "dst_ee": scores.acquisition()}
DROP_FRACTION, STOP = 0.3, 0.75  # of both rules


def number_grown(active: int, step: int, total_steps: int) -> int:
    """How many weights a layer exchanges at a step: a share of the active, by a cosine to zero."""
    done = min(step / math.floor(STOP * total_steps), 1)
    share = DROP_FRACTION / 2 * (1 + math.cos(math.pi * done))
    return max(math.floor(share * active), 1) if share else 0


def top(score: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k best of a score among some entries."""
    order = np.argsort(np.where(among, -score, np.inf), axis=None, kind="stable")[:k]
    chosen = np.zeros(score.size, bool)
    chosen[order] = True
    return chosen.reshape(score.shape)


def ignored_share(
    inactive: np.ndarray, later: np.ndarray, score: np.ndarray, k: int
) -> tuple[int, float]:
    """How many weights are important, and the share of them that the score does not grow.

    Args:
      inactive: bool, weights outside the mask.
      later: weights of the dense copy, later.
      score: of the growth rule.
      k: how many weights the layer grows.
    """
    k = min(k, int(inactive.sum()))
    important, grown = top(abs(later), inactive, k), top(score, inactive, k)
    return k, float((important & ~grown).sum() / max(k, 1))


def _batches(trainer: cifar.Trainer, count: int, size: int) -> Iterator[jax.Array]:
    """The first `count` batches of a training, as index arrays."""
    epochs = (np.asarray(trainer.order(epoch, size)) for epoch in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), count)


def measure(args: argparse.Namespace, arrays: Any) -> list[dict[str, Any]]:
    """Rows of one seed: a layer under a rule."""
    images, labels = jax.device_put(arrays)

    def trained(method: str, steps: int):
        options = [f"--method={method}", f"--model={args.model}", f"--epochs={args.epochs}"]
        options += [f"--dataset={args.dataset}", f"--sparsity={args.sparsity}"]
        options += [f"--drop_fraction={DROP_FRACTION}", f"--stop={STOP}"]
        trainer = cifar.Trainer(cifar.parse(options), len(images), args.seed)
        state = trainer.init()
        *early, last = _batches(trainer, steps, len(images))
        for number, index in enumerate(over(early, method), start=1):
            mask_step = number in trainer.learner.mask_steps
            state, _ = trainer.step(state, index, images, labels, mask_step)
        return trainer, state, last

    _, dense, _ = trained("dense", LATER + 1)
    rows = []
    for method, score in SCORES.items():
        trainer, state, index = trained(method, AT)  # the state before update number AT
        x = trainer.batch_of(state, index, images)
        grads = trainer.learner.gradient(state, x, labels[index])
        total = trainer.steps_per_epoch * args.epochs
        sparse = dstee.get_state(state.opt_state)
        rows_of = zip(
            trees.leaves_with_path(state.params),
            trees.mask_leaves(sparse.masks, state.params),
            trees.mask_leaves(sparse.counters, state.params),
            jax.tree.leaves(grads),
            jax.tree.leaves(dense.params),
            strict=True,
        )
        for (path, w), mask, counter, grad, later in rows_of:
            if trees.is_dense(mask) or bool(mask.all()):
                continue
            leaf = dstee.Leaf(w, grad, mask, counter, sparse.key, jnp.int32(AT))
            k = number_grown(int(mask.sum()), AT, total)
            k, share = ignored_share(~np.asarray(mask), *map(np.asarray, (later, score(leaf))), k)
            chance = 1 - k / max(int((~mask).sum()), 1)  # what growth at random would ignore
            row = {"method": method, "layer": trees.path_name(path), "k": k}
            rows.append(row | {"ignored": round(share, 4), "chance": round(chance, 4)})
    return rows


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="vgg19", choices=[*cifar.MODELS])
    add("--dataset", default="cifar10", choices=[*data.CLASSES])
    add("--sparsity", type=float, default=0.95)
    add("--epochs", type=int, default=160, help="that the schedule is made for")
    add("--seed", type=int, default=0)
    add("--data_dir", default="~/tensorflow_datasets")
    add("--note", help="what the record says of the data")
    add("--results", type=Path, default=records.RESULTS / "figure1.jsonl")
    args = parser.parse_args(argv)
    try:
        arrays = data.load(args.dataset, "train", args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    rows = measure(args, arrays)
    for row in rows:
        print(
            f"{row['method']:<8}{row['layer']:<28}k {row['k']:>7,}  ignored {row['ignored']:.1%}  "
            f"(growth at random: {row['chance']:.1%})"
        )
    named = ("model", "dataset", "sparsity", "epochs", "seed")
    record = {name: getattr(args, name) for name in named}
    records.append(args.results, record | {"data": args.note or args.dataset, "rows": rows})
    conclude(Console(), f"{len(rows)} layers and rules", record=args.results)


if __name__ == "__main__":
    main()
