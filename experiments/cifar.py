"""CIFAR-10 and CIFAR-100 by the protocol of the paper.

    python -m experiments.cifar --model vgg19 --dataset cifar10 --method dst_ee \\
        --sparsity 0.95 --seed 0 --data_dir DIR

SGD with Nesterov momentum 0.9, batch 128, weight decay 5e-4, learning rate 0.1 by cosine to
zero, 160 epochs, pad-4 crop and flip. `--model small --epochs 10` takes about 2 minutes on 2
CPU cores. Each run appends one line to results/cifar.jsonl (`--results` for another file) and,
with `--work_dir DIR`, writes checkpoints and TensorBoard events there; the same command with
`--resume` goes on from the last finished epoch, bit for bit.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from rich.console import Console

import dstee_jax as dstee
from experiments.data import cifar as data
from experiments.training import records, sis
from experiments.training.arguments import Parser, choice
from experiments.training.checkpoints import Checkpoints
from experiments.training.epochs import cosine_sgd, in_segments, shuffled
from experiments.training.learner import (
    Learner,
    TrainState,
    add_method_options,
    check_method_options,
    given_options,
)
from experiments.training.methods import METHODS, SCORED_PER_CLASS
from experiments.training.models import MODELS, count_weights
from experiments.training.progress import conclude, over
from experiments.training.runs import Events, check_same_command

WEIGHT_DECAY = 5e-4
PRUNED_FROM = 256  # images that SIS fits layers to
# Arguments that may change when a run goes on.
FREE = {"data_dir", "work_dir", "results", "quiet", "note", "resume"}


class Trainer:
    """A learner with the whole dataset on the device: epochs in an order of their own."""

    def __init__(
        self, args: argparse.Namespace, train_size: int, seed: int = 0, scored: Any = None
    ):
        """`scored`: images (uint8) and labels for methods that choose masks before training."""
        self.batch = args.batch
        self.steps_per_epoch = train_size // args.batch
        total = self.steps_per_epoch * args.epochs
        self.learner = Learner(
            functools.partial(MODELS[args.model], data.CLASSES[args.dataset]),
            cosine_sgd(args, total),
            args,
            total_steps=total,
            seed=seed,
            scored=scored and (data.normalise(scored[0]), scored[1]),
        )
        devices = jax.device_count() if args.sparse_allreduce else 1
        if self.batch % devices:
            raise ValueError(f"--batch {self.batch} must be a multiple of the {devices} devices.")
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        self.learn = self.learner.step_on(mesh)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self) -> TrainState:
        """The state before the first step, sparse already."""
        return self.learner.init()

    def prune(self, state: TrainState, images: jax.Array) -> TrainState:
        """SIS, from some of the training images."""
        some = images[np.random.default_rng(0).permutation(len(images))[:PRUNED_FROM]]
        return self.learner.prune(state, data.normalise(some))

    def batch_of(self, state: TrainState, index: jax.Array, images: jax.Array) -> jax.Array:
        """The augmented images of the next step, normalised."""
        key = jax.random.fold_in(jax.random.fold_in(self.learner.key, 2), state.step)
        return data.augment(key, data.normalise(images[index], self.learner.dtype))

    def _step(self, state, index, images, labels, mask_step):
        return self.learn(state, self.batch_of(state, index, images), labels[index], mask_step)

    @functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
    def step(
        self,
        state: TrainState,
        index: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        mask_step: bool,
    ) -> tuple[TrainState, jax.Array]:
        """One step on the images of that index, (batch,) int32; returns the state and the loss."""
        return self._step(state, index, images, labels, mask_step)

    @functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=1)
    def steps(
        self,
        state: TrainState,
        order: jax.Array,
        begin: int,
        end: int,
        images: jax.Array,
        labels: jax.Array,
        mask_step: bool,
    ) -> tuple[TrainState, jax.Array]:
        """The steps from `begin` to `end` of an epoch in one call; returns the sum of the losses.

        So an accelerator never waits for the host. All are mask steps or none is. `begin` and
        `end` are arguments of the compiled loop: one program for any number of steps.
        """

        def one(i, carry):
            state, total = carry
            state, loss = self._step(state, order[i], images, labels, mask_step)
            return state, total + loss

        return jax.lax.fori_loop(begin, end, one, (state, jnp.zeros(())))

    def order(self, epoch: int, size: int) -> jax.Array:
        """The images of each step of an epoch: indices (steps, batch)."""
        return shuffled(self.learner.key, epoch, size, self.batch)

    def epoch(self, state: TrainState, epoch: int, images: jax.Array, labels: jax.Array):
        """One pass over the data in an order of its own; returns the state and the mean loss."""
        # XLA's CPU convolutions are 30 times slower inside a loop.
        ahead = self.one_by_one if jax.default_backend() == "cpu" else self.in_segments
        return ahead(state, self.order(epoch, len(images)), epoch, images, labels)

    def one_by_one(self, state: TrainState, order: Any, epoch: int, images: Any, labels: Any):
        """An epoch, a call for each step."""
        losses, done = [], epoch * self.steps_per_epoch
        for number, index in enumerate(np.asarray(order), start=done + 1):
            mask_step = number in self.learner.mask_steps
            state, loss = self.step(state, index, images, labels, mask_step)
            losses.append(loss)
        return state, jnp.stack(losses).mean()

    def in_segments(self, state: TrainState, order: Any, epoch: int, images: Any, labels: Any):
        """An epoch, a call for each mask step and for all ordinary steps between two."""

        def steps(state, begin, end, mask_step):
            return self.steps(state, order, begin, end, images, labels, mask_step)

        done = epoch * self.steps_per_epoch
        return in_segments(steps, state, done, len(order), self.learner.mask_steps)

    @functools.partial(jax.jit, static_argnums=0)
    def _hits(self, state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
        return self.learner.hits(state, data.normalise(images, self.learner.dtype), labels)

    def evaluate(self, state: TrainState, images: jax.Array, labels: jax.Array) -> float:
        """Accuracy in percent; every image counts once."""
        hits = sum(
            self._hits(state, images[i : i + 500], labels[i : i + 500])
            for i in range(0, len(images), 500)
        )
        return 100 * float(hits) / len(images)


def settings(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What a record says of its run: `records.find` finds it by these."""
    named = ("dataset", "split", "model", "method", "sparsity", "epochs", "batch")
    decay = {} if args.weight_decay == WEIGHT_DECAY else {"weight_decay": args.weight_decay}
    return {
        **{name: getattr(args, name) for name in named},
        "seed": seed,
        "options": decay | given_options(args, "rescale", "sparse_allreduce"),
    }


def load(args: argparse.Namespace) -> Any:
    """Images and labels to train on, and to evaluate on."""
    return data.load_splits(args.dataset, args.data_dir, args.split == "validation")


def store_of(args: argparse.Namespace) -> Checkpoints:
    """Those in `--work_dir`: with `--resume` of the same command, else none yet."""
    store = Checkpoints(args.work_dir, keep=args.resume)
    if store.latest() is None:
        (args.work_dir / "config.json").unlink(missing_ok=True)
    check_same_command(args, FREE)
    return store


def run(args: argparse.Namespace, seed: int = 0, arrays: Any = None) -> dict[str, Any]:
    """Train one seed, evaluate after each epoch, and return the record."""
    console = Console(quiet=args.quiet)
    print_ = console.print
    (images, labels), (eval_images, eval_labels) = jax.device_put(arrays or load(args))
    scored = None
    if METHODS[args.method].first_masks is not None:
        some = np.random.default_rng(seed).permutation(len(images))
        some = some[: SCORED_PER_CLASS * data.CLASSES[args.dataset]]
        scored = images[some], labels[some]
    trainer = Trainer(args, len(images), seed, scored)
    state, first, history = trainer.init(), 0, []
    print_(f"{args.model}: {count_weights(state.params):,} weights")
    if scored is not None:
        print_(dstee.summary(state.opt_state, state.params))
    store = store_of(args) if args.work_dir else None
    prune_at = round(sis.PRUNE_AT * args.epochs) if trainer.learner.pruned else None
    if store and store.latest() is not None:
        first = store.latest()
        if prune_at is not None and first > prune_at:
            state = trainer.prune(state, images)  # for its shapes
        state, history = store.restore(state)
        dstee.check(trainer.learner.tx, state.opt_state, state.params)
    events = Events(args.work_dir, first) if args.work_dir else None
    seconds = sum(row["seconds"] for row in history)
    density, explored = map(float, trainer.learner.measures(state))

    epochs = range(first, args.epochs)
    for epoch in over(epochs, f"{args.method}, seed {seed}", console, done=first):
        begin = time.perf_counter()
        if epoch == prune_at:
            state = trainer.prune(state, images)
        state, loss = trainer.epoch(state, epoch, images, labels)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} after epoch {epoch}: lower --learning_rate."
            )
        took = time.perf_counter() - begin
        seconds += took
        density, explored = map(float, trainer.learner.measures(state))
        accuracy = trainer.evaluate(state, eval_images, eval_labels)
        row = {
            "epoch": epoch + 1,
            "loss": round(float(loss), 4),
            "accuracy": accuracy,
            "R": round(explored, 4),
            "seconds": round(took, 2),
        }
        history.append(row)
        left = (args.epochs - epoch - 1) * seconds / (epoch + 1)
        speed = trainer.steps_per_epoch * args.batch / took
        print_(
            f"epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}  {args.split} {accuracy:.2f}%  "
            f"R {explored:.3f}  {speed:,.0f} images/s  {left / 60:.1f} min left"
        )
        if store:
            events.add(epoch + 1, **{name: row[name] for name in ("loss", "accuracy", "R")})
            store.save(epoch + 1, state, history)

    if dstee.get_states(state.opt_state):
        print_(dstee.summary(state.opt_state, state.params))
    return settings(args, seed) | {
        "steps": trainer.steps_per_epoch * args.epochs,
        "data": args.note or args.dataset,
        "accuracy": history[-1]["accuracy"],
        "best_accuracy": max(row["accuracy"] for row in history),
        "density": round(density, 6),
        "R": history[-1]["R"],
        "seconds": round(seconds, 1),
        "history": [[row["accuracy"], row["R"]] for row in history],
    }


def run_and_record(args: argparse.Namespace, seed: int, arrays: Any) -> dict[str, Any]:
    """`run`, whose record is kept as soon as there is one."""
    record = run(args, seed, arrays)
    records.append(args.results, record)
    return record


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with the nearest valid ones."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=choice([*MODELS]), default="vgg19", help=", ".join(MODELS))
    add("--dataset", type=choice([*data.CLASSES]), default="cifar10")
    add("--seed", type=int, nargs="+", default=[0], help="one run each, one after the other")
    add("--epochs", type=int, default=160)
    add("--batch", type=int, default=128)
    add("--learning_rate", type=float, default=0.1)
    add("--weight_decay", type=float, default=WEIGHT_DECAY, help="for str it sets the sparsity")
    add_method_options(parser)
    add("--split", choices=["test", "validation"], default="test")
    add("--data_dir", default="~/tensorflow_datasets")
    add("--note", help="what the record says of the data, as 'CIFAR-10 (JPEG q75)'")
    add("--work_dir", type=Path, help="where checkpoints and TensorBoard events go")
    add("--resume", action="store_true", help="go on from the last checkpoint in --work_dir")
    add("--results", type=Path, default=records.RESULTS / "cifar.jsonl")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    check_method_options(parser, args)
    if args.resume and not args.work_dir:
        parser.error("--resume needs the --work_dir of the run to resume.")
    if args.work_dir and len(args.seed) > 1:
        parser.error("--work_dir holds one run: pass one --seed.")
    if args.method == "dense":
        args.sparsity = 0.0
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    try:
        arrays = load(args)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    runs = [run_and_record(args, seed, arrays) for seed in args.seed]
    accuracy = records.mean_sd(run["accuracy"] for run in runs)
    what = f"{args.method} at {args.sparsity:.0%}: {accuracy}% of the {args.split} images right"
    conclude(Console(quiet=args.quiet), what, record=args.results, checkpoints=args.work_dir)


if __name__ == "__main__":
    main()
