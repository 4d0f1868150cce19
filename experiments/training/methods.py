"""Methods by the names that the command lines take, and what each needs from a trainer."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dstee_jax as dstee
from dstee_jax import at_init, methods, structures
from experiments.training import reparameterised
from experiments.training.reparameterised import Reparameterisation

_SCHEDULE = ("every", "start", "stop", "drop_fraction", "structure", "regrow")
SCORED_PER_CLASS = 10  # images of a class that SNIP and GraSP see, on average


def _classes(name: str, shape: Sequence[int]) -> bool:
    """Whether the units of a leaf are classes, or the one output of `linkpred`."""
    return "head" in name or shape[-1] in (1, 10)


def _mest_published(
    inner: optax.GradientTransformation, *, sparsity: float, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """MEST with the shares of its scripts, 0.02 of all weights at 90%, and their lambda."""
    shares = {"mutation": 0.2 * (1 - sparsity), "gradient_weight": 0.5}
    return methods.mest(inner, sparsity=sparsity, **shares, **options)


STRUCTURES = {"constant_fan_in": structures.constant_fan_in()}
# Of a tile, from its weights'. The mean of a tile ranks as its sum does.
TILE_SCORES: dict[str, Callable[..., jax.Array]] = {"sum": jnp.sum, "largest": jnp.max}


def uniform_first_dense(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The same sparsity for every layer but the first, which stays dense: it reads 3 channels."""
    first = {name: 0.0 for name, shape in shapes.items() if len(shape) == 4 and shape[-2] == 3}
    return dstee.uniform(shapes, sparsity) | first


DISTRIBUTIONS = {
    "erk": dstee.erk,
    "uniform": dstee.uniform,
    "uniform_first_dense": uniform_first_dense,
}


class Method(NamedTuple):
    """How a method by name becomes an optimizer.

    Attributes:
      factory: from `dstee_jax.methods`, or None where no masks are kept.
      options: of the command line that the factory takes; others are not passed on.
      first_masks: from `dstee_jax.at_init`, for methods that choose their masks once.
      reparameterised: where the network's parameters come from, for methods that train others.
      pruned: dense until `experiments.training.sis.PRUNE_AT`, then pruned once and masked (SIS).
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs] | None
    options: tuple[str, ...] = ()
    first_masks: Callable[..., Any] | None = None
    reparameterised: Callable[..., Reparameterisation] | None = None
    pruned: bool = False


MAGNITUDE_STE = functools.partial(reparameterised.ste, at_random=False)
RANDOM_STE = functools.partial(reparameterised.ste, at_random=True)

METHODS = {
    "dense": Method(None),
    # one mask, chosen before training
    "static": Method(methods.static, ("structure",)),
    "magnitude": Method(methods.static, first_masks=at_init.magnitude),
    "snip": Method(methods.static, first_masks=at_init.snip),
    "grasp": Method(methods.static, first_masks=at_init.grasp),
    "synflow": Method(methods.static, first_masks=at_init.synflow),
    "csti": Method(methods.static, first_masks=at_init.csti),
    # from dense to sparse
    "str": Method(None, reparameterised=reparameterised.thresholds),
    "powerpropagation": Method(methods.gmp, ("every",), reparameterised=reparameterised.powers),
    "magnitude_ste": Method(None, reparameterised=MAGNITUDE_STE),
    "random_ste": Method(None, reparameterised=RANDOM_STE),
    "top_kast": Method(None, reparameterised=reparameterised.sets_of_top_kast),
    "sis": Method(methods.static, pruned=True),
    "gmp": Method(methods.gmp, ("every",)),
    "gmp_overall": Method(functools.partial(methods.gmp, overall=True), ("every",)),
    "admm": Method(methods.admm),
    "gap": Method(methods.gap),
    "granet": Method(methods.granet, ("every",)),
    "ac_dc": Method(methods.ac_dc, ("every", "start", "stop")),
    # sparse from the first step to the last
    "deep_r": Method(methods.deep_r),
    "set": Method(methods.set, _SCHEDULE),
    "set_published": Method(functools.partial(methods.set, zeta=0.3), ("every",)),
    "set_itop": Method(methods.set_itop, ("every",)),
    "snfs": Method(methods.snfs, ("every",)),
    "dsr": Method(methods.dsr, ("every",)),
    "gse": Method(methods.gse, ("every", "stop")),
    "cht": Method(methods.cht, ("every", "stop", "drop_fraction")),
    "chts": Method(methods.chts, ("every", "stop", "drop_fraction")),
    "smet": Method(
        functools.partial(methods.smet, betas=None),  # the experiments' optimizer is SGD
        ("every", "start", "stop"),
    ),
    "mest": Method(methods.mest, ("every",)),
    "mest_published": Method(_mest_published, ("every",)),
    "mest_ems": Method(methods.mest_ems, ("every",)),
    "rigl": Method(methods.rigl, _SCHEDULE),
    "rigl_itop": Method(methods.rigl_itop, ("every",)),
    "srigl": Method(
        functools.partial(methods.srigl, exempt=_classes),
        ("every", "start", "stop", "drop_fraction"),
    ),
    "dst_ee": Method(methods.dst_ee, (*_SCHEDULE, "c", "eps", "normalize", "counter_init")),
}


def optimizer(
    method: str,
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    total_steps: int,
    key: jax.Array,
    masks: Any = None,
    selection: str = "auto",
    indices: bool = False,
    tiles: Sequence[int] | None = None,
    tile_score: str | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`inner` made sparse by the method of that name; `inner` alone where no masks are kept.

    Options that the method does not have are left out; `distribution`, `where`, `stack_axes` and
    `scale` are for all. `masks` are those of `first_masks`; `selection` and `indices` are
    `dstee.transform`'s. `tiles`: of active weights, for kernels that they divide; the others
    stay dense, and moments are packed. `tile_score`: of TILE_SCORES, the sum if it is None.
    """
    factory, names, *_ = METHODS[method]
    if factory is None:
        return optax.with_extra_args_support(inner)
    names = (*names, "distribution", "where", "stack_axes", "scale")
    options = {name: value for name, value in options.items() if name in names}
    for name, named in (("structure", STRUCTURES), ("distribution", DISTRIBUTIONS)):
        if options.get(name):
            options[name] = named[options[name]]
    if masks is None:
        options["sparsity"] = sparsity
    if tiles is not None:
        score = TILE_SCORES[tile_score or "sum"]
        options |= {"structure": structures.tiles(tuple(tiles), score=score), "packed": True}
        options.setdefault("where", functools.partial(tiles_divide, tiles))
    options |= {"masks": masks, "selection": selection, "indices": indices}
    return factory(inner, total_steps=total_steps, key=key, **options)


def tiles_divide(tiles: Sequence[int], path: Any, leaf: Any) -> bool:
    """`where` of kernels that tiles divide."""
    sizes = zip(leaf.shape[-2:], tiles, strict=False)
    return dstee.kernels(path, leaf) and not any(n % size for n, size in sizes)


def mask_steps(method: str, tx: optax.GradientTransformation) -> Sequence[int]:
    """The steps, from 1, on which the masks of that method's optimizer may change."""
    factory, *_, pruned = METHODS[method]
    return dstee.mask_steps_of(tx) if factory and not pruned else ()


def segments(done: int, count: int, mask_steps: Sequence[int]) -> list[tuple[int, int, bool]]:
    """The `count` steps after the first `done`, cut where ordinary and mask steps meet.

    Returns:
      (begin, end, mask_step) of each segment of steps of one kind: from `begin` of [0, count) to
      before `end`.
    """
    kinds = itertools.groupby(range(count), lambda i: done + i + 1 in mask_steps)
    cut = [(mask_step, list(steps)) for mask_step, steps in kinds]
    return [(steps[0], steps[-1] + 1, mask_step) for mask_step, steps in cut]


def reparameterisation(
    method: str, *, sparsity: float, total_steps: int, distribution: str | None = None
) -> Reparameterisation:
    """Where the network's parameters come from: for most methods they are those it trains."""
    make = METHODS[method].reparameterised
    if make is None:
        return Reparameterisation()
    named = DISTRIBUTIONS[distribution or "erk"]
    return make(sparsity=sparsity, total_steps=total_steps, distribution=named)


def measures(opt_state: Any, network: Any = None) -> tuple[jax.Array, jax.Array]:
    """Density and exploration degree R; both 1 without masks, which R is read from.

    `network`: the network's parameters, if others are trained: the density is theirs then.
    """
    one = jnp.ones((), jnp.float32)
    if dstee.get_states(opt_state):
        return dstee.density(opt_state), dstee.exploration_degree(opt_state)
    return one if network is None else reparameterised.density(network), one


def first_masks(
    method: str,
    params: Any,
    batch: tuple[jax.Array, jax.Array],
    sparsity: float,
    key: jax.Array,
    *,
    network: Callable[[Any, jax.Array, bool], jax.Array],
) -> Any:
    """The masks of a method that chooses them before training, None for the others.

    Args:
      method: its name.
      params: parameters.
      batch: images and labels.
      sparsity: in [0, 1).
      key: PRNG key.
      network: `(params, images, training) -> logits`.
    """
    score = METHODS[method].first_masks
    if score is None:
        return None
    temperature = 200.0 if method == "grasp" else 1.0

    def loss(params, batch):
        images, labels = batch
        logits = network(params, images, True) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    if method == "synflow":
        return score(lambda p, x: network(p, x, False), params, batch[0][:1], sparsity, key)
    if method == "csti":
        return score(None, params, batch[0], sparsity, key)
    return score(loss, params, batch, sparsity, key)
