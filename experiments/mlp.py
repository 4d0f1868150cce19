"""An MLP on MNIST, or on CIFAR-10's images as vectors: all seeds of a run trained at once.

    python -m experiments.mlp --dataset mnist --sparsity 0.98 --epochs 40 --method dst_ee \\
        --data_dir DIR

A network of 784-300-100-10 (`--widths`), biases dense, weights rescaled to their sparse fan-in
(`--no-rescale`), batch 128, SGD with Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.05
by cosine to zero, no augmentation. `jax.vmap` trains all `--seeds` together, each with weights,
masks and an order of the images of its own. Accuracy is that on the test set after each epoch,
or with `--validation N` on the last N training images, which are then not trained on.

The command takes 3 to 4 minutes on 2 CPU cores (5 s an epoch of 468 steps of 4 seeds), and ends
at 97.1% with R 0.20. It appends one line to results/mlp.jsonl (`--results` for another
file), which `python -m experiments.report.table` prints. With `--work_dir DIR` a checkpoint is
written there after each epoch: the same command goes on from the last, bit for bit.
"""

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dstee_jax as dstee
from experiments.data import arrays as data
from experiments.data import cifar
from experiments.training import records, sis
from experiments.training.arguments import Parser, at_least_one, choice, tile_of
from experiments.training.checkpoints import Checkpoints
from experiments.training.epochs import cosine_sgd, in_segments, shuffled
from experiments.training.learner import (
    Learner,
    TrainState,
    add_method_options,
    check_method_options,
    given_options,
)
from experiments.training.methods import METHODS, SCORED_PER_CLASS, TILE_SCORES
from experiments.training.models import MLP, count_weights
from experiments.training.progress import conclude, over
from experiments.training.runs import check_same_command, record_once

CLASSES = 10  # of each dataset
# Mean and standard deviation of the channels of the training images, in units of 255.
DATASETS = {"mnist": (np.float32(0.1307), np.float32(0.3081)), "cifar10": (cifar.MEAN, cifar.SD)}
FREE = {"data_dir", "work_dir", "results", "quiet", "note"}  # may change when a run goes on


def axes(state: TrainState) -> TrainState:
    """`in_axes` of `jax.vmap` over seeds: all have the same step counters."""
    return TrainState(0, 0, dstee.seed_axes(state.opt_state), None)


def active(tiles: Any) -> list[dstee.Tiles]:
    """The tiles of each layer that has some, in order."""
    nodes = jax.tree.leaves(tiles, is_leaf=lambda node: isinstance(node, dstee.Tiles))
    return [node for node in nodes if isinstance(node, dstee.Tiles)]


class Trainer:
    """A learner for each seed, made where `jax.vmap` runs over them.

    `train` is images (n, height, width, channels) uint8 and labels (n,), on the device.
    """

    def __init__(self, args: argparse.Namespace, shape: tuple[int, ...]):
        """`shape`: of the images to train on."""
        self.args, (self.size, *image) = args, shape
        self.inputs = math.prod(image)
        if args.tiles:
            self.inputs += -self.inputs % args.tiles[0]
        self.steps_per_epoch = self.size // args.batch
        if not self.steps_per_epoch:
            raise ValueError(f"--batch {args.batch} is more than all {self.size} images.")
        self.seeds = jnp.array(args.seeds, jnp.int32)
        method = METHODS[args.method]
        self.chooses = method.first_masks is not None
        self.prune_at = round(sis.PRUNE_AT * args.epochs) if method.pruned else None
        self.mask_steps = self.learner(args.seeds[0]).mask_steps

    def learner(self, seed: Any, state: TrainState | None = None, scored: Any = None) -> Learner:
        """That of one seed; masks that were chosen once are those in its state."""
        total = self.steps_per_epoch * self.args.epochs
        learner = Learner(
            functools.partial(MLP, self.inputs, self.args.widths, CLASSES),
            cosine_sgd(self.args, total),
            self.args,
            total_steps=total,
            seed=seed,
            scored=scored,
        )
        chosen = self.chooses or self.prune_at is not None
        if chosen and state is not None and dstee.get_states(state.opt_state):
            learner.keep(dstee.get_state(state.opt_state).masks)
        return learner

    def normalised(self, images: jax.Array) -> jax.Array:
        """Of zero mean and unit variance."""
        dtype = jnp.bfloat16 if self.args.bf16 else jnp.float32
        return cifar.normalise(images, dtype, *DATASETS[self.args.dataset])

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, train: Any) -> TrainState:
        """The state of all seeds before the first step, sparse already."""

        def some(seed):
            key = jax.random.fold_in(jax.random.key(seed), 5)
            index = jax.random.permutation(key, self.size)[: SCORED_PER_CLASS * CLASSES]
            return self.normalised(train[0][index]), train[1][index]

        def one(seed):
            return self.learner(seed, scored=some(seed) if self.chooses else None).init()

        state = jax.eval_shape(one, self.seeds[0])
        return jax.vmap(one, out_axes=axes(state))(self.seeds)

    @functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
    def steps(
        self, state: TrainState, order: jax.Array, begin: int, end: int, train: Any, mask_step: bool
    ) -> tuple[TrainState, jax.Array]:
        """The steps from `begin` to `end` of an epoch, all of one kind; sums of losses (seeds,)."""

        tiles = None
        if self.args.tiles and not mask_step:
            tiles, state = self.in_tiles(state)

        def step(state, seed, index, *tiles):
            x, y = self.normalised(train[0][index]), train[1][index]
            learner = self.learner(seed, None if tiles else state)
            return learner.step(state, x, y, mask_step, *map(active, tiles))

        given = () if tiles is None else (tiles,)
        places = (axes(state), 0, 0, *(0 for _ in given))
        of_all = jax.vmap(step, in_axes=places, out_axes=(axes(state), 0))

        def ahead(i, carry):
            state, total = carry
            state, loss = of_all(state, self.seeds, order[:, i], *given)
            return state, total + loss

        state, total = jax.lax.fori_loop(begin, end, ahead, (state, jnp.zeros(len(self.seeds))))
        if tiles is not None:
            state = state._replace(params=jax.vmap(dstee.to_dense)(state.params, tiles))
        return state, total

    def in_tiles(self, state: TrainState) -> tuple[Any, TrainState]:
        """The tiles of all seeds, and the state with kernels as their rectangles."""
        found = jax.vmap(dstee.tiles, in_axes=(dstee.seed_axes(state.opt_state), 0))
        tiles = found(state.opt_state, state.params)
        return tiles, state._replace(params=jax.vmap(dstee.to_tiles)(state.params, tiles))

    @functools.partial(jax.jit, static_argnums=0)
    def order(self, epoch: int) -> jax.Array:
        """The images of each step of an epoch, for each seed: indices (seeds, steps, batch)."""

        def one(seed):
            return shuffled(jax.random.key(seed), epoch, self.size, self.args.batch)

        return jax.vmap(one)(self.seeds)

    def epoch(self, state: TrainState, epoch: int, train: Any) -> tuple[TrainState, jax.Array]:
        """One pass over the images; returns the state and the mean loss of each seed."""
        order, done = self.order(epoch), epoch * self.steps_per_epoch

        def steps(state, begin, end, mask_step):
            return self.steps(state, order, begin, end, train, mask_step)

        return in_segments(steps, state, done, self.steps_per_epoch, self.mask_steps)

    @functools.partial(jax.jit, static_argnums=0)
    def prune(self, state: TrainState, images: jax.Array) -> TrainState:
        """SIS, from some of the training images."""
        some = np.random.default_rng(0).permutation(self.size)[: sis.ROWS]
        x = self.normalised(images[some])

        def one(state, seed):
            return self.learner(seed).prune(state, x)

        alone = jax.tree.map(lambda x: x[0], state._replace(step=state.step[None]))
        pruned = axes(jax.eval_shape(one, alone, self.seeds[0]))
        return jax.vmap(one, in_axes=(axes(state), 0), out_axes=pruned)(state, self.seeds)

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, state: TrainState, held_out: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """How many images are classified right, density and exploration degree R; each (seeds,)."""
        x, labels = self.normalised(held_out[0]), held_out[1]

        def one(state, seed):
            learner = self.learner(seed, state)
            return learner.hits(state, x, labels), *learner.measures(state)

        return jax.vmap(one, in_axes=(axes(state), 0))(state, self.seeds)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of its run: `records.find` finds it by these."""
    named = ("dataset", "validation", "method", "sparsity", "epochs", "batch", "learning_rate")
    named += ("weight_decay", "rescale", "seeds")
    of_tiles = {
        name: getattr(args, name) for name in ("tiles", "tile_score") if getattr(args, name)
    }
    return {
        **{name: getattr(args, name) for name in named},
        "split": "validation" if args.validation else "test",
        "model": "mlp " + "-".join(map(str, args.widths)),
        "options": given_options(args, "bf16") | of_tiles,
    }


def load(args: argparse.Namespace) -> tuple[data.Arrays, data.Arrays]:
    """Images and labels to train on, and to evaluate on."""
    train = data.load(args.dataset, "train", args.data_dir)
    if args.validation:
        return data.hold_out(train, args.validation)
    return train, data.load(args.dataset, "test", args.data_dir)


def restored(store: Checkpoints, trainer: Trainer, state: TrainState, images: jax.Array) -> Any:
    """The last state of a run that was stopped, or `state`, and the rows of its epochs."""
    first = store.latest()
    if first is None:
        return state, []
    if trainer.prune_at is not None and first > trainer.prune_at:
        state = trainer.prune(state, images)  # for its shapes
    return store.restore(state)


def row_of(losses: jax.Array, measured: Any, images: int) -> dict[str, list[float]]:
    """What is kept of an epoch, a value for each seed; `measured` of `Trainer.evaluate`."""
    hits, density, explored = jax.device_get(measured)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the losses of the seeds are {losses}: lower --learning_rate.")
    values = {"loss": losses, "accuracy": 100 * hits / images, "density": density, "R": explored}
    return {name: np.round(np.float64(x), 6).tolist() for name, x in values.items()}


def step_ms(rows: list[dict[str, Any]], steps: int) -> float:
    """Milliseconds of a step of all seeds: the fastest epoch's, the first left out if it can be."""
    return round(1e3 * min(row["seconds"] for row in rows[1:] or rows) / steps, 2)


def run(args: argparse.Namespace, arrays: Any = None) -> dict[str, Any]:
    """Train all seeds, evaluate after each epoch, and return the record."""
    console = Console(quiet=args.quiet)
    print_ = console.print
    train, held_out = jax.device_put(arrays or load(args))
    trainer = Trainer(args, train[0].shape)
    state, rows, store = trainer.init(train), [], None
    print_(f"{len(args.seeds)} seeds, {count_weights(state.params) // len(args.seeds):,} weights")
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        check_same_command(args, FREE)
        store = Checkpoints(args.work_dir, keep=True)
        state, rows = restored(store, trainer, state, train[0])
    first = len(rows)
    for epoch in over(range(first, args.epochs), args.method, console, done=first):
        begin = time.perf_counter()
        if epoch == trainer.prune_at:
            state = trainer.prune(state, train[0])
        state, losses = trainer.epoch(state, epoch, train)
        row = row_of(losses, trainer.evaluate(state, held_out), len(held_out[0]))
        rows.append(row | {"seconds": round(time.perf_counter() - begin, 2)})
        print_(
            f"epoch {epoch + 1}/{args.epochs}  loss {np.mean(losses):.3f}  "
            f"accuracy {records.mean_sd(row['accuracy'])}%  R {np.mean(row['R']):.3f}  "
            f"{rows[-1]['seconds']:.1f} s"
        )
        if store:
            store.save(epoch + 1, state, rows)
    curves = np.array([[row["accuracy"], row["R"]] for row in rows]).transpose(2, 0, 1)
    return settings(args) | {
        "data": args.note or args.dataset,
        "steps": trainer.steps_per_epoch * args.epochs,
        **{name: rows[-1][name] for name in ("accuracy", "density", "R")},
        "best_accuracy": curves[..., 0].max(1).tolist(),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "step_ms": step_ms(rows, trainer.steps_per_epoch),
        "history": curves.tolist(),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with what to pass instead."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", type=choice([*DATASETS]), default="mnist", help=", ".join(DATASETS))
    add(
        "--widths",
        type=at_least_one,
        nargs="+",
        help="of the hidden layers; 300 100, with --tiles 1024 1024",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="all trained at once")
    add("--epochs", type=at_least_one, default=40)
    add("--batch", type=at_least_one, default=128)
    add("--learning_rate", type=float, default=0.05)
    add("--weight_decay", type=float, default=1e-4, help="for str it sets the sparsity")
    add_method_options(parser)
    parser.set_defaults(sparsity=0.98, rescale=True)
    add("--validation", type=int, default=0, help="training images to evaluate on, from the end")
    add("--data_dir", default="~/tensorflow_datasets")
    add("--tiles", type=at_least_one, nargs="+", help="of active weights: N for N x N, or two")
    add("--tile_score", type=choice([*TILE_SCORES]), help="of a tile from its weights'; sum")
    add("--note", help="what the record says of the data, as 'CIFAR-10 (JPEG q75)'")
    add("--work_dir", type=Path, help="of checkpoints; the same command goes on from the last")
    add("--results", type=Path, default=records.RESULTS / "mlp.jsonl")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    check_method_options(parser, args)
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity} must be in [0, 1), as 0.98 for 2% of weights.")
    if args.validation < 0:
        parser.error(f"--validation {args.validation} must be 0, for the test set, or more.")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds} must be different, and 0 or more.")
    if args.sparse_allreduce:
        parser.error(
            "--sparse_allreduce is for several devices, all seeds run on one: leave it out."
        )
    if args.distribution == "uniform_first_dense":
        parser.error("--distribution uniform_first_dense is for images: pass erk or uniform.")
    args.tiles = tile_of(parser, args.tiles)
    if args.tile_score and not args.tiles:
        parser.error(f"--tile_score {args.tile_score} is of --tiles: pass some, or leave it out.")
    if args.tile_score and args.method == "static":
        parser.error("--method static moves no tile: leave --tile_score out.")
    if args.tile_score == "sum":  # as without it
        args.tile_score = None
    args.widths = args.widths or ([1024, 1024] if args.tiles else [300, 100])
    if args.tiles:
        having = [name for name, of in METHODS.items() if "structure" in of.options]
        if args.structure or args.method not in having:
            parser.error(
                f"--tiles {args.tiles} goes without --structure, and with a method of "
                f"{', '.join(having)}."
            )
        if any(width % size for width in args.widths for size in args.tiles):
            parser.error(f"--tiles {args.tiles} must divide all --widths {args.widths}, as 1024.")
    if args.method == "dense":
        args.sparsity = 0.0
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    try:
        record = run(args)
        record_once(args, record)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    what = f"{args.method} at {args.sparsity:.0%}: {records.mean_sd(record['accuracy'])}% right"
    conclude(Console(quiet=args.quiet), what, record=args.results, checkpoints=args.work_dir)


if __name__ == "__main__":
    main()
