"""A network and its optimizer by the name of a method: init, step, prune and predict.

What `experiments.cifar`, `imagenet` and `mlp` share; pure functions of a `TrainState`, to be
jitted by the caller as its devices ask for.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from experiments.training import sis
from experiments.training.arguments import Parser, choice
from experiments.training.methods import (
    DISTRIBUTIONS,
    METHODS,
    STRUCTURES,
    first_masks,
    mask_steps,
    measures,
    optimizer,
    reparameterisation,
)

OWN_OPTIONS = ("normalize", "counter_init", "regrow")  # errors for methods without them
OPTIONS = ("every", "start", "stop", "drop_fraction", "c", "eps", "structure", "distribution")
OPTIONS += OWN_OPTIONS


def check_method_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where options do not go with the method."""
    method = METHODS[args.method]
    if args.sparse_allreduce and (method.factory is None or method.pruned):
        parser.error(f"--method {args.method} trains no masks: leave --sparse_allreduce out.")
    for name in OWN_OPTIONS:
        having = [method for method, of in METHODS.items() if name in of.options]
        if getattr(args, name) is not None and args.method not in having:
            parser.error(f"--{name} is for {', '.join(having)}: leave it out of {args.method}.")


def given_options(args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """The options of the method that the command line gave, and those of `flags` that are on."""
    given = {name: getattr(args, name) for name in OPTIONS}
    on = {name: True for name in flags if getattr(args, name)}
    return {name: value for name, value in given.items() if value is not None} | on


class TrainState(NamedTuple):
    """All that training changes: what a checkpoint holds."""

    params: Any
    stats: Any  # running statistics of the batch norms
    opt_state: Any
    step: jax.Array  # int32, shape ()


def add_method_options(parser: Parser) -> None:
    """The command line's options of the method, the same for every experiment."""
    add = parser.add_argument
    add("--method", type=choice([*METHODS]), default="dst_ee", help=", ".join(METHODS))
    add("--sparsity", type=float, default=0.95, help="in [0, 1); not used by dense")
    add("--every", type=int, help="steps between mask updates")
    add("--start", rare=True, type=float, help="share of training before the first mask update")
    add("--stop", rare=True, type=float, help="share of training after which masks stay")
    add("--drop_fraction", rare=True, type=float)
    add("--c", type=float, help="exploration coefficient of dst_ee")
    add("--eps", rare=True, type=float)
    add(
        "--structure",
        rare=True,
        type=choice([*STRUCTURES]),
        help="of the masks: " + ", ".join(STRUCTURES),
    )
    add("--distribution", rare=True, type=choice([*DISTRIBUTIONS]), help=", ".join(DISTRIBUTIONS))
    normalize = "the scale-free acquisition of dst_ee: gradients over their layer's mean"
    add("--normalize", rare=True, action="store_true", default=None, help=normalize)
    add("--counter_init", rare=True, choices=["masks", "zeros"], help="of dst_ee")
    regrow = "whether weights may grow in the round that drops them"
    add("--regrow", rare=True, action=argparse.BooleanOptionalAction, help=regrow)
    scale = "sparse-aware initial scale"
    add("--rescale", rare=True, action=argparse.BooleanOptionalAction, default=False, help=scale)
    add(
        "--sparse_allreduce",
        rare=True,
        action="store_true",
        help="data-parallel over all devices, with dstee.pmean; batch norm sees a device's part",
    )
    add(
        "--bf16",
        rare=True,
        action="store_true",
        help="compute in bfloat16; parameters stay float32",
    )


class Learner:
    """A network and an optimizer, and the functions that train and evaluate it."""

    def __init__(
        self,
        model: Callable[..., nnx.Module],
        inner: optax.GradientTransformation,
        args: argparse.Namespace,
        *,
        total_steps: int,
        seed: int = 0,
        label_smoothing: float = 0.0,
        scored: tuple[jax.Array, jax.Array] | None = None,
        selection: str = "auto",
    ):
        """Make the optimizer of `args.method`, with masks where it chooses them now.

        Args:
          model: makes the network, from `dtype` and `rngs`.
          inner: the optimizer that the method wraps.
          args: with the options of `add_method_options`.
          total_steps: of the training.
          seed: of the weights and of the masks.
          label_smoothing: in [0, 1).
          scored: normalised images and labels for methods that choose masks before training.
          selection: of `dstee.transform`; 'sharded' for parameters that are sharded.
        """
        self.key = jax.random.key(seed)
        self.pruned = METHODS[args.method].pruned
        self.reparameterised = METHODS[args.method].reparameterised is not None
        self.rescale, self.sparsity = args.rescale, args.sparsity
        self.dtype = jnp.bfloat16 if args.bf16 else jnp.float32
        self.label_smoothing = label_smoothing
        self.axis = "data" if args.sparse_allreduce else None
        self.reparameterisation = reparameterisation(
            args.method,
            sparsity=args.sparsity,
            total_steps=total_steps,
            distribution=args.distribution,
        )
        self._model = model
        shapes = nnx.eval_shape(lambda: self._built(training=True))
        self.train_def = nnx.split(shapes, nnx.Param, nnx.BatchStat)[0]
        shapes.eval()
        self.eval_def = nnx.split(shapes, nnx.Param, nnx.BatchStat)[0]
        self._make = functools.partial(
            optimizer,
            args.method,
            inner,
            sparsity=args.sparsity,
            total_steps=total_steps,
            key=jax.random.fold_in(self.key, 1),
            selection=selection,
            indices=args.sparse_allreduce,
            tiles=getattr(args, "tiles", None),
            tile_score=getattr(args, "tile_score", None),
            **given_options(args),
        )
        self.tx = optax.with_extra_args_support(inner)
        if not self.pruned:
            self.tx = self._make(masks=self._chosen(args, scored))
        self.mask_steps = mask_steps(args.method, self.tx)
        # Whether steps between mask steps read dense gradients, as those of a method with memory.
        self.dense_between = self.axis is not None and list(self.mask_steps) != list(
            dstee.dense_steps_of(self.tx)
        )

    def _built(self, training: bool) -> nnx.Module:
        model = self._model(dtype=self.dtype, rngs=nnx.Rngs(jax.random.fold_in(self.key, 0)))
        model.train() if training else model.eval()
        return model

    def _first(self) -> tuple[Any, Any]:
        """Parameters and statistics before training."""
        return nnx.split(self._built(training=True), nnx.Param, nnx.BatchStat)[1:]

    def _chosen(self, args: argparse.Namespace, scored: Any) -> Any:
        """Masks that the method chooses before training, None where it does not."""
        if scored is None:
            return None
        params, stats = jax.jit(self._first)()

        def network(params, x, training):
            graph = self.train_def if training else self.eval_def
            return nnx.merge(graph, params, stats, copy=True)(x).astype(jnp.float32)

        return first_masks(
            args.method,
            switched_on(params),
            (scored[0].astype(self.dtype), scored[1]),
            args.sparsity,
            jax.random.fold_in(self.key, 4),
            network=network,
        )

    def init(self) -> TrainState:
        """The state before the first step, sparse already."""
        params, stats = self._first()
        params = self.reparameterisation.init(params)
        opt_state = self.tx.init(params)
        if dstee.get_states(opt_state):
            params = dstee.rescale(params, opt_state) if self.rescale else params
            params = dstee.apply_masks(params, opt_state)
        return TrainState(params, stats, opt_state, jnp.zeros((), jnp.int32))

    def _grads(self, state: TrainState, x: jax.Array, y: jax.Array, *tiles: Any) -> Any:
        """((loss, statistics), gradient) on normalised images and labels."""

        def loss_fn(params):
            seen, penalty = self.reparameterisation.apply(params, state.step)
            model = nnx.merge(self.train_def, seen, state.stats, copy=True)
            logits = model(x, *tiles).astype(jnp.float32)
            targets = jax.nn.one_hot(y, logits.shape[-1])
            targets = optax.smooth_labels(targets, self.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            return loss + penalty, nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss_fn, has_aux=True)(state.params)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(self, state: TrainState, x: jax.Array, y: jax.Array) -> Any:
        """The dense gradient of the loss on normalised images (n, h, w, 3) and labels (n,)."""
        return self._grads(state, x, y)[1]

    def step(
        self, state: TrainState, x: jax.Array, y: jax.Array, mask_step: bool, *tiles: Any
    ) -> tuple[TrainState, jax.Array]:
        """One step on normalised images (n, h, w, 3) and labels (n,); the new state, the loss.

        `mask_step`: whether it is one of `mask_steps`; the program of the others has no mask
        update in it. `tiles`: those of the parameters, if these are in tiles; for the model.
        """
        if self.axis is None:
            (loss, stats), grads = self._grads(state, x, y, *tiles)
        else:  # one device's part of the batch
            mine = state._replace(params=jax.lax.pcast(state.params, self.axis, to="varying"))
            (loss, stats), grads = self._grads(mine, x, y)
            dense = (mask_step or None) if self.dense_between else mask_step
            grads = dstee.pmean(grads, state.opt_state, self.axis, dense=dense)
            loss, stats = jax.lax.pmean((loss, stats), self.axis)
        params, opt_state = dstee.apply(
            self.tx, grads, state.opt_state, state.params, mask_step=mask_step
        )
        return TrainState(params, stats, opt_state, state.step + 1), loss

    def step_on(self, mesh: Mesh) -> Callable[..., tuple[TrainState, jax.Array]]:
        """`step` over the devices of a mesh: as it is, or with `--sparse_allreduce` mapped."""
        if self.axis is None:
            return self.step
        part = P(self.axis)

        def mapped(state, x, y, mask_step):
            step = functools.partial(self.step, mask_step=mask_step)
            specs = {"in_specs": (P(), part, part), "out_specs": (P(), P())}
            return jax.shard_map(step, mesh=mesh, **specs)(state, x, y)

        return mapped

    def hits(self, state: TrainState, x: jax.Array, y: jax.Array) -> jax.Array:
        """How many of the images (normalised) are classified as their label; int32, shape ()."""
        model = nnx.merge(self.eval_def, self.seen(state), state.stats)
        return jnp.sum(model(x).argmax(-1) == y, dtype=jnp.int32)

    def seen(self, state: TrainState) -> Any:
        """The parameters that the network sees: for most methods those that are trained."""
        return self.reparameterisation.apply(state.params, state.step)[0]

    def measures(self, state: TrainState) -> tuple[jax.Array, jax.Array]:
        """Density and exploration degree R; float32, shape () each."""
        return measures(state.opt_state, self.seen(state) if self.reparameterised else None)

    def keep(self, masks: Any) -> None:
        """Train with masks that stay as they are, from here on."""
        self.tx = self._make(masks=masks)

    def prune(self, state: TrainState, x: jax.Array) -> TrainState:
        """SIS: sparsify each layer of the trained network, and keep the masks from here on.

        Args:
          state: of dense training.
          x: normalised images that layers are fitted to.
        """
        model = nnx.merge(self.eval_def, state.params, state.stats, copy=True)
        params, masks = sis.sparsify_model(model, x, self.sparsity)
        self.keep(masks)
        opt_state = self.tx.init(params)
        explored = jax.tree.map(jnp.ones_like, opt_state.counters)  # all weights were active
        opt_state = opt_state._replace(counters=explored, inner_state=state.opt_state)
        return state._replace(params=params, opt_state=opt_state)


def switched_on(params: Any) -> Any:
    """A ResNet's blocks start with a scale of zero: with ones, their weights get a score."""

    def on(path, leaf):
        scale = "scale" in jax.tree_util.keystr(path)
        return jnp.where((leaf == 0).all(), 1, leaf) if scale else leaf

    return jax.tree_util.tree_map_with_path(on, params)
