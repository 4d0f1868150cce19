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
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import dstee_jax as dstee
from dstee_jax import soft_threshold
from dstee_jax.state import find_states
from experiments import data, records, sis
from experiments.methods import (
    METHODS,
    STRUCTURES,
    choice,
    first_masks,
    measures,
    model_params,
    optimizer,
)
from experiments.models import MODELS, count_weights

SCORED_PER_CLASS = 10  # images of a class that SNIP and GraSP see, on average
WEIGHT_DECAY = 5e-4
PRUNED_FROM = 256  # images that SIS fits layers to
THRESHOLD_START = -5.0  # STR's first threshold is sigmoid(-5) = 0.0067


class TrainState(NamedTuple):
    """All that training changes: what a checkpoint holds."""

    params: Any
    stats: Any  # running statistics of the batch norms
    opt_state: Any
    step: jax.Array  # int32, shape ()


def _switched_on(params: Any) -> Any:
    """A ResNet's blocks start with a scale of zero: with ones, their weights get a score."""

    def on(path, leaf):
        scale = "scale" in jax.tree_util.keystr(path)
        return jnp.where((leaf == 0).all(), 1, leaf) if scale else leaf

    return jax.tree_util.tree_map_with_path(on, params)


class Trainer:
    """A network, an optimizer and the jitted functions that train and evaluate it."""

    def __init__(
        self, args: argparse.Namespace, train_size: int, seed: int = 0, scored: Any = None
    ):
        """`scored`: images (uint8) and labels for methods that choose masks before training."""
        self.batch = args.batch
        self.steps_per_epoch = train_size // args.batch
        self.key = jax.random.key(seed)
        self.trains = METHODS[args.method].trains
        self.rescale, self.sparsity = args.rescale, args.sparsity
        dtype = jnp.bfloat16 if args.bf16 else jnp.float32
        self.dtype = dtype

        @functools.partial(jax.jit, static_argnums=0)
        def build(training):
            rngs = nnx.Rngs(jax.random.fold_in(self.key, 0))
            model = MODELS[args.model](data.CLASSES[args.dataset], dtype=dtype, rngs=rngs)
            model.train() if training else model.eval()
            return nnx.split(model, nnx.Param, nnx.BatchStat)

        self.train_def, self.first_params, self.first_stats = build(True)
        self.eval_def = build(False)[0]
        total = self.steps_per_epoch * args.epochs
        schedule = optax.cosine_decay_schedule(args.learning_rate, total)
        inner = optax.chain(
            optax.add_decayed_weights(args.weight_decay),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
        names = ("every", "start", "stop", "drop_fraction", "c", "eps", "structure")
        options = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        self._make = functools.partial(
            optimizer,
            args.method,
            inner,
            sparsity=args.sparsity,
            total_steps=total,
            key=jax.random.fold_in(self.key, 1),
            **options,
        )
        if self.trains != "masked":
            self.tx = inner
            return
        masks = None
        if scored is not None:
            masks = first_masks(
                args.method,
                _switched_on(self.first_params),
                (data.normalise(scored[0], dtype), scored[1]),
                args.sparsity,
                jax.random.fold_in(self.key, 4),
                network=self._network,
            )
        self.tx = self._make(masks=masks)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self) -> TrainState:
        """The state before the first step, sparse already."""
        params = self.first_params
        if self.trains == "thresholds":
            params = soft_threshold.init(params, start=THRESHOLD_START)
        opt_state = self.tx.init(params)
        if find_states(opt_state):
            masks = dstee.get_state(opt_state).masks
            params = dstee.rescale(params, masks) if self.rescale else params
            params = dstee.apply_masks(params, masks)
        return TrainState(params, self.first_stats, opt_state, jnp.zeros((), jnp.int32))

    def prune(self, state: TrainState, images: jax.Array) -> TrainState:
        """SIS: sparsify each layer of the trained network, and keep the masks from here on."""
        model = nnx.merge(self.eval_def, state.params, state.stats, copy=True)
        some = images[np.random.default_rng(0).permutation(len(images))[:PRUNED_FROM]]
        params, masks = sis.sparsify_model(model, data.normalise(some), self.sparsity)
        self.tx = self._make(masks=masks)
        opt_state = self.tx.init(params)
        explored = jax.tree.map(jnp.ones_like, opt_state.counters)  # all weights were active
        opt_state = opt_state._replace(counters=explored, inner_state=state.opt_state)
        return state._replace(params=params, opt_state=opt_state)

    def _network(self, params, x, training):
        """Logits of the untrained network, with its first statistics."""
        graph = self.train_def if training else self.eval_def
        model = nnx.merge(graph, params, self.first_stats, copy=True)
        return model(x).astype(jnp.float32)

    def _loss(self, params, stats, x, y):
        model = nnx.merge(self.train_def, model_params(params), stats, copy=True)
        logits = model(x).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, nnx.state(model, nnx.BatchStat)

    def _step(self, state: TrainState, index: jax.Array, images: jax.Array, labels: jax.Array):
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2), state.step)
        x = data.augment(key, data.normalise(images[index], self.dtype))
        grad_fn = jax.value_and_grad(self._loss, has_aux=True)
        (loss, stats), grads = grad_fn(state.params, state.stats, x, labels[index])
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state, state.step + 1), loss

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: TrainState, index: jax.Array, images: jax.Array, labels: jax.Array):
        """One step on the images of that index, (batch,) int32; returns the state and the loss."""
        return self._step(state, index, images, labels)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def scan_epoch(self, state: TrainState, order: jax.Array, images: jax.Array, labels: jax.Array):
        """All steps of an epoch in one call, so that an accelerator never waits for the host."""
        return jax.lax.scan(lambda s, index: self._step(s, index, images, labels), state, order)

    def epoch(self, state: TrainState, epoch: int, images: jax.Array, labels: jax.Array):
        """One pass over the data in an order of its own; returns the state and the mean loss."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, 3), epoch)
        used = self.steps_per_epoch * self.batch
        order = jax.random.permutation(key, len(images))[:used].reshape(-1, self.batch)
        if jax.default_backend() != "cpu":
            state, losses = self.scan_epoch(state, order, images, labels)
            return state, losses.mean()
        losses = []  # XLA's CPU convolutions are 30 times slower inside a scan
        for index in np.asarray(order):
            state, loss = self.step(state, index, images, labels)
            losses.append(loss)
        return state, jnp.stack(losses).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def _hits(self, state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(self.eval_def, model_params(state.params), state.stats)
        return jnp.sum(model(data.normalise(images, self.dtype)).argmax(-1) == labels)

    def evaluate(self, state: TrainState, images: jax.Array, labels: jax.Array) -> float:
        """Accuracy in percent; every image counts once."""
        hits = sum(
            self._hits(state, images[i : i + 500], labels[i : i + 500])
            for i in range(0, len(images), 500)
        )
        return 100 * float(hits) / len(images)


def run(args: argparse.Namespace, seed: int = 0, arrays: Any = None) -> dict[str, Any]:
    """Train one seed, evaluate after each epoch, and return the record."""
    print_ = Console(quiet=args.quiet).print
    if arrays is None:
        arrays = data.load_splits(args.dataset, args.data_dir, args.split == "validation")
    (images, labels), (eval_images, eval_labels) = jax.device_put(arrays)
    scored = None
    if METHODS[args.method].first_masks is not None:
        some = np.random.default_rng(seed).permutation(len(images))
        some = some[: SCORED_PER_CLASS * data.CLASSES[args.dataset]]
        scored = images[some], labels[some]
    trainer = Trainer(args, len(images), seed, scored)
    state, first, history = trainer.init(), 0, []
    print_(f"{args.model}: {count_weights(state.params):,} weights")
    store = _Checkpoints(args) if args.work_dir else None
    prune_at = round(sis.PRUNE_AT * args.epochs) if trainer.trains == "pruned" else None
    if store and args.resume:
        if prune_at is not None and (store.manager.latest_step() or 0) > prune_at:
            state = trainer.prune(state, images)  # for its shapes
        state, first, history = store.restore(state)
    seconds = sum(row["seconds"] for row in history)
    density, explored = map(float, measures(state.params, state.opt_state))

    for epoch in range(first, args.epochs):
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
        density, explored = map(float, measures(state.params, state.opt_state))
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
            store.save(epoch + 1, state, history)

    if find_states(state.opt_state):
        print_(dstee.summary(state.opt_state))
    named = ("dataset", "split", "model", "method", "sparsity", "epochs", "batch")
    options = ("every", "start", "stop", "drop_fraction", "c", "eps", "rescale", "structure")
    decay = {} if args.weight_decay == WEIGHT_DECAY else {"weight_decay": args.weight_decay}
    return {
        **{name: getattr(args, name) for name in named},
        "seed": seed,
        "data": args.note or args.dataset,
        "options": decay
        | {n: getattr(args, n) for n in options if getattr(args, n) not in (None, False)},
        "accuracy": history[-1]["accuracy"],
        "best_accuracy": max(row["accuracy"] for row in history),
        "density": round(density, 6),
        "R": history[-1]["R"],
        "seconds": round(seconds, 1),
        "history": [[row["accuracy"], row["R"]] for row in history],
    }


class _Checkpoints:
    """Orbax checkpoints and TensorBoard events of one run, in its working directory."""

    def __init__(self, args: argparse.Namespace):
        import json

        import orbax.checkpoint as ocp
        from tensorboardX import SummaryWriter

        self.json, self.path = json, args.work_dir.resolve()
        if not args.resume and (self.path / "checkpoints").exists():
            shutil.rmtree(self.path / "checkpoints")
        self.manager = ocp.CheckpointManager(
            self.path / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
            item_names=("state", "history"),
        )
        self.ocp, self.events = ocp, SummaryWriter(str(self.path / "events"))

    def save(self, epoch: int, state: TrainState, history: list[dict[str, Any]]) -> None:
        for name in ("loss", "accuracy", "R"):
            self.events.add_scalar(name, history[-1][name], epoch)
        self.events.flush()
        save = self.ocp.args
        self.manager.save(
            epoch,
            args=save.Composite(state=save.StandardSave(state), history=save.JsonSave(history)),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, int, list[dict[str, Any]]]:
        epoch = self.manager.latest_step()
        if epoch is None:
            return state, 0, []
        load = self.ocp.args
        loaded = self.manager.restore(
            epoch,
            args=load.Composite(state=load.StandardRestore(state), history=load.JsonRestore()),
        )
        return loaded["state"], epoch, loaded["history"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with the nearest valid ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=choice([*MODELS]), default="vgg19", help=", ".join(MODELS))
    add("--dataset", type=choice([*data.CLASSES]), default="cifar10")
    add("--method", type=choice([*METHODS]), default="dst_ee", help=", ".join(METHODS))
    add("--sparsity", type=float, default=0.95, help="in [0, 1); not used by dense")
    add("--seed", type=int, nargs="+", default=[0], help="one run each, one after the other")
    add("--epochs", type=int, default=160)
    add("--batch", type=int, default=128)
    add("--learning_rate", type=float, default=0.1)
    add("--weight_decay", type=float, default=WEIGHT_DECAY, help="for str it sets the sparsity")
    add("--every", type=int, help="steps between mask updates")
    add("--start", type=float, help="share of training before the first mask update")
    add("--stop", type=float, help="share of training after which masks stay")
    add("--drop_fraction", type=float)
    add("--c", type=float, help="exploration coefficient of dst_ee")
    add("--eps", type=float)
    add("--structure", type=choice([*STRUCTURES]), help="of the masks: " + ", ".join(STRUCTURES))
    add("--rescale", action="store_true", help="sparse-aware initial scale")
    add("--bf16", action="store_true", help="compute in bfloat16; parameters stay float32")
    add("--split", choices=["test", "validation"], default="test")
    add("--data_dir", default="~/tensorflow_datasets")
    add("--note", help="what the record says of the data, as 'CIFAR-10 (JPEG q75)'")
    add("--work_dir", type=Path, help="where checkpoints and TensorBoard events go")
    add("--resume", action="store_true", help="go on from the last checkpoint in --work_dir")
    add("--results", type=Path, default=records.RESULTS / "cifar.jsonl")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
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
        arrays = data.load_splits(args.dataset, args.data_dir, args.split == "validation")
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    for seed in args.seed:
        records.append(args.results, run(args, seed, arrays))


if __name__ == "__main__":
    main()
