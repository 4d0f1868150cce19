"""What the factories share: the options that they hand on to `transform`, and how."""

from collections.abc import Mapping
from typing import Any, Required, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import check_whole
from dstee_jax.masks.counts import Blocks, Sparsity, StackAxes, Where
from dstee_jax.masks.distributions import Distribution
from dstee_jax.rules.memory import Memory
from dstee_jax.rules.plans import Plan
from dstee_jax.rules.schedule import DropFraction, Every
from dstee_jax.rules.scores import Score
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.largest import Selection
from dstee_jax.transform import transform
from dstee_jax.trees import PyTree

Inner: TypeAlias = optax.GradientTransformation | None
Transform: TypeAlias = optax.GradientTransformationExtraArgs


class Shared(TypedDict, total=False):
    """Keyword arguments of `dstee.transform` that no factory names itself."""

    key: Required[jax.Array]
    distribution: Distribution
    where: Where
    masks: PyTree | None
    drop: Score | None
    grow: Score | None
    drop_fraction: DropFraction
    every: Every | None
    regrow: bool
    update_weights: bool
    plan: Plan | None
    memory: Memory | None
    penalty: Score | None
    scale: Score | None
    structure: Structure | None
    counter_init: str
    counter_update: str
    counter_dtype: Any
    selection: Selection
    stack_axes: StackAxes | None
    blocks: Blocks | None
    packed: bool
    indices: bool
    grow_batches: int


class Untimed(Shared, total=False):
    """Those of a factory that names `total_steps`."""

    sparsity: Sparsity | None
    start: float
    stop: float


class Options(Untimed, total=False):
    """All keyword arguments of `dstee.transform`."""

    total_steps: Required[int]


def make(inner: Inner, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> Transform:
    """`dstee.transform` with a method's defaults, which the caller's options override."""
    return transform(inner, **{**defaults, **options})


def half_to_nearly_none(total_steps: int) -> optax.Schedule:
    """The rate of SNFS, ITOP and GraNet: from 0.5 by cosine to 0.005 at the end."""
    return cosine(total_steps, 0.5, 0.01)


def cosine(total_steps: int, first: float, alpha: float) -> optax.Schedule:
    """From `first` by cosine to `alpha` times as much at the end.

    As `optax.cosine_decay_schedule`, also under strict dtype promotion.
    """
    check_whole("total_steps", total_steps, least=None)
    steps = max(total_steps, 1)

    def schedule(count: jax.Array) -> jax.Array:
        angle = jnp.pi * jnp.minimum(count, steps).astype(jnp.float32) / steps
        return first * ((1 - alpha) * (0.5 * (1 + jnp.cos(angle))) + alpha)

    return schedule


def halved_by_thirds(total_steps: int) -> optax.Schedule:
    """The rate of MEST: 0.3, then 0.15 and 0.075 after each third of the training."""
    check_whole("total_steps", total_steps, least=None)
    first, second = max(total_steps // 3, 1), max(2 * total_steps // 3, 2)

    def schedule(count: jax.Array) -> jax.Array:
        return jnp.where(count < first, 0.3, jnp.where(count < second, 0.15, 0.075))

    return schedule


def halved_at(step: int, first: float) -> optax.Schedule:
    """`first`, and half of it from that step on."""
    return lambda count: jnp.where(count < step, first, first / 2)


def linear(total_steps: int, first: float, last: float) -> optax.Schedule:
    """From `first` at step 0 to `last` at the end, in a straight line."""
    check_whole("total_steps", total_steps, least=None)
    steps = max(total_steps, 1)

    def schedule(count: jax.Array) -> jax.Array:
        return first + (last - first) * (jnp.minimum(count, steps).astype(jnp.float32) / steps)

    return schedule


def itop(total_steps: int) -> dict[str, Any]:
    """ITOP's setting: the optimizer steps first, rounds to the end, just-dropped may regrow."""
    return {
        "total_steps": total_steps,
        "drop_fraction": half_to_nearly_none(total_steps),
        "stop": 1.0,
        "regrow": True,
        "update_weights": True,
    }
