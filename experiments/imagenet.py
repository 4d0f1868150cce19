"""ResNet-50 on ImageNet by the protocol of the paper, on one GPU machine or a pod.

    python -m experiments.imagenet --method dst_ee --sparsity 0.9 --data_dir DIR --work_dir RUN \\
        --batch 1024 --bf16

ResNet-50 v1.5, 100 epochs, SGD with Nesterov momentum 0.9, learning rate 0.1 for each 128 images
of the batch with 5 epochs of warm-up and a cosine to zero, weight decay 1e-4, label smoothing
0.1. Data-parallel over all devices of all processes; `--shard_params` shards parameters, masks,
counters and moments too. docs/imagenet.md says how to start it on several machines.

The same command, started again, goes on from the last checkpoint in `--work_dir`, bit for bit
where the devices compute the same twice. SIGTERM saves and leaves.
"""

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import dstee_jax as dstee
from experiments.data import imagenet as images
from experiments.data.cifar import normalise
from experiments.training import records, sis
from experiments.training.arguments import Parser, choice
from experiments.training.checkpoints import Checkpoints
from experiments.training.learner import (
    Learner,
    TrainState,
    add_method_options,
    check_method_options,
    given_options,
)
from experiments.training.methods import METHODS
from experiments.training.models import ResNet50, Small, count_weights
from experiments.training.progress import conclude, over
from experiments.training.runs import Log, Preemption, check_same_command, leave, record_once

CLASSES = 1000
# Mean and standard deviation of the channels of ImageNet's training images, in units of 255.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
SD = np.array([0.229, 0.224, 0.225], np.float32)
MODELS = {"resnet50": functools.partial(ResNet50, large=True), "small": Small}
SCORED = 512  # images that SNIP and GraSP see
# Arguments that may change when a run goes on.
FREE = {"data_dir", "work_dir", "results", "quiet", "log_every", "save_every", "eval_every"}
FREE |= {"lost_after", "coordinator", "num_processes", "process_id", "distributed", "note"}
PRUNED_FROM = 32  # images that SIS fits layers to


class Programs(NamedTuple):
    """The compiled functions of a run, for one structure of its state."""

    shardings: TrainState
    step: Any  # (state, images, labels, mask_step) -> (state, loss); a program for each kind
    hits: Any  # (state, images, labels) -> correct ones
    is_finite: Any  # state -> whether all parameters are
    measures: Any  # state -> density, R


def sharding_of(mesh: Mesh, shape: tuple[int, ...], shard: bool) -> NamedSharding:
    """Replicated, or split along the longest axis that the devices divide.

    Masks, counters and moments have their parameter's shape, and so its sharding.
    """
    able = [axis for axis, n in enumerate(shape) if n % mesh.size == 0 and n > 0]
    if not shard or not able:
        return NamedSharding(mesh, P())
    longest = max(able, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, "data"))


def compile_for(learner: Learner, state: Any, mesh: Mesh, shard: bool) -> Programs:
    """Jit the run's functions for a state (or its shapes)."""
    shardings = jax.tree.map(lambda leaf: sharding_of(mesh, leaf.shape, shard), state)
    batch, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def normalised(x):
        return normalise(x, learner.dtype, MEAN, SD)

    step = learner.step_on(mesh)
    jit = functools.partial(jax.jit, in_shardings=(shardings, batch, batch))
    return Programs(
        shardings,
        jit(
            lambda state, x, y, mask_step: step(state, normalised(x), y, mask_step),
            out_shardings=(shardings, whole),
            static_argnums=3,
            donate_argnums=0,
        ),
        jit(lambda state, x, y: learner.hits(state, normalised(x), y), out_shardings=whole),
        jax.jit(all_finite, in_shardings=(shardings,), out_shardings=whole),
        jax.jit(learner.measures, out_shardings=whole),
    )


def both_steps(programs: Programs, learner: Learner, state: Any, batch: Any) -> dict[bool, Any]:
    """The compiled step without and with a mask update, by whether it has one.

    Compiled before the first step, so that no process waits for another in the middle of a run.
    """
    kinds = {False, len(learner.mask_steps) > 0}
    return {kind: programs.step.lower(state, *batch, kind).compile() for kind in kinds}


def all_finite(state: TrainState) -> jax.Array:
    """Whether all parameters and statistics are finite; bool, shape ()."""
    floats = jax.tree.leaves((state.params, state.stats))
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Images and labels of this process as parts of arrays over all devices."""
    sharding = NamedSharding(mesh, P("data"))
    make = jax.make_array_from_process_local_data
    return make(sharding, batch["image"]), make(sharding, batch["label"])


def check_finite(losses: list[jax.Array], step: int) -> np.ndarray:
    """The losses of the steps up to `step`, as numbers.

    Raises:
      FloatingPointError: one is not finite; names its step.
    """
    values = np.asarray([float(loss) for loss in losses])
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        at = step - len(values) + int(bad[0]) + 1
        raise FloatingPointError(f"the loss is {values[bad[0]]} at step {at}: {_REMEDY}")
    return values


_REMEDY = (
    "lower --learning_rate, raise --warmup_epochs, or leave --bf16 out, and start again in another "
    "--work_dir. The last checkpoint is from before it."
)


def evaluate(
    programs: Programs, state: TrainState, examples: Any, args: argparse.Namespace, mesh: Mesh
) -> float:
    """Accuracy in percent; every example counts once, whatever the batch."""
    batches = images.validation_batches(
        examples,
        batch=args.batch,
        size=args.image_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=args.workers,
    )
    hits = sum(programs.hits(state, *global_batch(batch, mesh)) for batch in batches)
    batches.close()
    return 100 * int(hits) / len(examples)


def fake_batches(args: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """One random batch again and again: what the devices could do, if input cost nothing."""
    rng, n = np.random.default_rng(0), args.batch // jax.process_count()
    x = rng.integers(0, 256, (n, args.image_size, args.image_size, 3), dtype=np.uint8)
    batch = {"image": x, "label": rng.integers(0, CLASSES, n, dtype=np.int32)}
    while True:
        yield batch


def some_images(examples: Any, args: argparse.Namespace, count: int) -> Any:
    """`count` augmented training images, normalised, and labels: the same on each process."""
    batches = images.train_batches(
        examples, batch=count, size=args.image_size, seed=args.seed + 1, workers=0
    )
    batch = next(batches)
    batches.close()
    return normalise(jnp.asarray(batch["image"]), jnp.float32, MEAN, SD), batch["label"]


class Setup(NamedTuple):
    """The data and the learner of a run."""

    train: Any  # examples, or None for random images
    held_out: Any
    per_epoch: int  # steps
    total: int  # steps
    learner: Learner


def set_up(args: argparse.Namespace, mesh: Mesh) -> Setup:
    """Open the data, and make the network and its optimizer."""
    check_batch(args, mesh)
    train = None if args.fake_data else images.source("train", args.data_dir)
    held_out = None if args.fake_data else images.source("validation", args.data_dir)
    per_epoch = (1_281_167 if train is None else len(train)) // args.batch
    if per_epoch < 1:
        raise SystemExit(f"error: --batch {args.batch} is more than all {len(train)} images.")
    total = args.steps or per_epoch * args.epochs
    warmup = min(round(args.warmup_epochs * per_epoch), total // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate * args.batch / 128, warmup, total
    )
    inner = optax.chain(
        optax.add_decayed_weights(args.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    chooses = METHODS[args.method].first_masks is not None
    learner = Learner(
        functools.partial(MODELS[args.model], CLASSES),
        inner,
        args,
        total_steps=total,
        seed=args.seed,
        label_smoothing=args.label_smoothing,
        scored=some_images(train, args, min(SCORED, len(train))) if chooses else None,
        selection="sharded" if args.shard_params else "auto",
    )
    return Setup(train, held_out, per_epoch, total, learner)


def open_input(train: Any, args: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the training batches."""
    if train is None:
        return fake_batches(args)
    return images.train_batches(
        train,
        batch=args.batch,
        size=args.image_size,
        seed=args.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=args.workers,
    )


def pruned(
    setup: Setup, state: TrainState, args: argparse.Namespace, mesh: Mesh
) -> tuple[Programs, TrainState]:
    """SIS: the pruned state, and the functions that train it on."""
    local = jax.tree.map(lambda x: jnp.asarray(x.addressable_data(0)), state)
    x, _ = some_images(setup.train, args, min(PRUNED_FROM, len(setup.train)))
    local = setup.learner.prune(local, x)
    programs = compile_for(setup.learner, local, mesh, args.shard_params)
    return programs, jax.device_put(local, programs.shardings)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, evaluate, and return the record; None if SIGTERM came first."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    setup = set_up(args, mesh)
    learner, total = setup.learner, setup.total
    check_same_command(args, FREE)
    programs = compile_for(learner, jax.eval_shape(learner.init), mesh, args.shard_params)
    state = jax.jit(learner.init, out_shardings=programs.shardings)()
    prune_at = round(sis.PRUNE_AT * total) if learner.pruned else None
    batches = open_input(setup.train, args)
    store = Checkpoints(args.work_dir, keep=True)
    first, notes = store.latest() or 0, {}
    if first:
        if prune_at is not None and first > prune_at:
            programs, state = pruned(setup, state, args, mesh)  # for its shapes
        state, notes = store.restore(state)
        dstee.check(learner.tx, state.opt_state, state.params)
        if setup.train is not None:
            batches.set_state(notes["input"])
    log = Log(args, first)
    log.print(
        f"{args.model}: {count_weights(state.params):,} weights, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, {total:,} steps of {args.batch} images"
        + (f", from step {first:,}" if first else "")
    )
    accuracy, speeds = notes.get("accuracy"), notes.get("speeds", [])

    def save(step: int, losses: list[jax.Array]) -> None:
        check_finite(losses, step)
        if not programs.is_finite(state):
            raise FloatingPointError(f"a parameter is not finite after step {step}: {_REMEDY}")
        if step != store.latest():
            position = None if setup.train is None else batches.get_state()
            store.save(step, state, {"input": position, "accuracy": accuracy, "speeds": speeds})

    preempted, losses, begin = Preemption(), [], time.perf_counter()
    compiled: dict[bool, Any] = {}
    density, explored = map(float, programs.measures(state))
    for step in over(range(first + 1, total + 1), args.method, log.console, done=first):
        if step - 1 == prune_at:
            (programs, state), compiled = pruned(setup, state, args, mesh), {}
        batch = global_batch(next(batches), mesh)
        compiled = compiled or both_steps(programs, learner, state, batch)
        state, loss = compiled[step in learner.mask_steps](state, *batch)
        losses.append(loss)
        if step % args.log_every == 0 or step == total:
            mean = float(check_finite(losses, step).mean())
            speed = len(losses) * args.batch / (time.perf_counter() - begin)
            density, explored = map(float, programs.measures(state))
            speeds = [*speeds, round(speed, 1)][-20:]
            log.write(step, loss=mean, images_per_s=speed, density=density, R=explored)
            log.print(
                f"step {step:,}/{total:,}  loss {mean:.3f}  density {density:.4f}  "
                f"R {explored:.3f}  {speed:,.0f} images/s  "
                f"{(total - step) * args.batch / speed / 60:.1f} min left"
            )
            losses, begin = [], time.perf_counter()
        epoch_ends = step % (args.eval_every * setup.per_epoch) == 0
        evaluates = setup.held_out and (epoch_ends or step == total)
        saves = step % args.save_every == 0 or step == total
        if evaluates or saves:
            jax.block_until_ready(loss)
        aside = time.perf_counter()  # what follows is not training
        if evaluates:
            accuracy = evaluate(programs, state, setup.held_out, args, mesh)
            log.write(step, accuracy=accuracy)
            log.print(f"step {step:,}  validation {accuracy:.2f}%")
        if saves:
            save(step, losses)
        if step < total and preempted(step):
            save(step, losses)
            log.print(f"SIGTERM: saved at step {step:,}; the same command goes on from there.")
            return None
        begin += time.perf_counter() - aside
    if setup.train is not None:
        batches.close()
    named = ("model", "method", "sparsity", "epochs", "batch", "image_size", "seed")
    return {
        "dataset": "imagenet2012",
        "data": "random images" if args.fake_data else args.note or "imagenet2012",
        **{name: getattr(args, name) for name in named},
        "steps": total,
        "options": given_options(args, "bf16", "shard_params", "sparse_allreduce"),
        "accuracy": accuracy,
        "density": round(density, 6),
        "R": round(explored, 4),
        "images_per_s": float(np.median(speeds)),
    }


def check_batch(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raise unless every device gets the same number of images."""
    if args.batch % mesh.size:
        raise SystemExit(
            f"error: --batch {args.batch} must be a multiple of the {mesh.size} devices."
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with the nearest valid ones."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=choice([*MODELS]), default="resnet50", help=", ".join(MODELS))
    add_method_options(parser)
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=100)
    add("--steps", type=int, help="of the training, instead of --epochs")
    add("--batch", type=int, default=128, help="of all devices together")
    add("--learning_rate", type=float, default=0.1, help="for each 128 images of the batch")
    add("--warmup_epochs", type=float, default=5)
    add("--weight_decay", type=float, default=1e-4, help="for str it sets the sparsity")
    add("--label_smoothing", rare=True, type=float, default=0.1)
    add("--image_size", type=int, default=224, help="pixels; small ones for a try on a CPU")
    add("--shard_params", action="store_true", help="over the devices, with masks and moments")
    add("--data_dir", default="~/tensorflow_datasets")
    add(
        "--fake_data",
        rare=True,
        action="store_true",
        help="one random batch: the speed without input",
    )
    add("--workers", type=int, default=8, help="processes that decode; 0 for threads")
    add("--work_dir", type=Path, required=True, help="of checkpoints, metrics.jsonl and events")
    add("--log_every", rare=True, type=int, default=50, help="steps")
    add("--save_every", type=int, default=1000, help="steps")
    add("--eval_every", rare=True, type=int, default=1, help="epochs")
    add("--distributed", action="store_true", help="several processes, found by TPU or SLURM")
    add("--coordinator", rare=True, help="HOST:PORT of process 0, where they are not found")
    add("--num_processes", rare=True, type=int)
    add("--process_id", rare=True, type=int)
    add(
        "--lost_after",
        rare=True,
        type=int,
        default=100,
        help="seconds of silence that end all processes",
    )
    add("--note", rare=True, help="what the record says of the data")
    add("--results", type=Path, default=records.RESULTS / "imagenet.jsonl")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    if args.method == "dense":
        args.sparsity = 0.0
    if "://" in str(args.work_dir) or ":/" in str(args.work_dir):
        parser.error(f"--work_dir {args.work_dir} is no directory: mount the bucket, or use NFS.")
    check_method_options(parser, args)
    if args.sparse_allreduce and args.shard_params:
        parser.error("--sparse_allreduce keeps the parameters whole: leave --shard_params out.")
    if args.method == "sis" and args.shard_params:
        parser.error("--method sis prunes layer by layer: leave --shard_params out.")
    if args.coordinator and (args.num_processes is None or args.process_id is None):
        parser.error("--coordinator needs --num_processes and --process_id.")
    if args.fake_data and METHODS[args.method].first_masks is not None:
        parser.error(f"--method {args.method} needs data for its masks: leave --fake_data out.")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=args.lost_after,
        )
    elif args.distributed:
        jax.distributed.initialize(heartbeat_timeout_seconds=args.lost_after)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        record = run(args)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        leave(error)
    if record is not None and jax.process_index() == 0:
        record_once(args, record)
        right = "" if record["accuracy"] is None else f"{record['accuracy']:.2f}% right, "
        speed = f"{record['images_per_s']:,.0f} images/s"
        what = f"{args.method} at {args.sparsity:.0%}: {right}{speed}"
        conclude(Console(quiet=args.quiet), what, record=args.results, checkpoints=args.work_dir)


if __name__ == "__main__":
    main()
