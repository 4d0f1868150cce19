"""When the masks change, and how many weights move then."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import check_number, check_whole, is_number, shown

DropFraction = float | Callable[[jax.Array], jax.Array]


# Steps between rounds, or a function of a mask step (0 at first) to the steps until the next.
Every = int | Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The mask steps of a run.

    Attributes:
      every: steps between rounds, 0 for no rounds; not used where `steps` is given.
      first: no round before this step.
      last: no round after this step.
      fraction: optax schedule of the step, the share of active weights to drop.
      highest: largest fraction over all rounds (static bound for `k_max`).
      total_steps: of the training.
      steps: all mask steps, where they are not the multiples of `every`.
    """

    every: int
    first: int
    last: int
    fraction: Callable[[jax.Array], jax.Array]
    highest: float
    total_steps: int
    steps: tuple[int, ...] | None = None

    def is_round(self, count: jax.Array) -> jax.Array:
        """Whether step `count` (int32, from 1) is a mask step; bool, shape ()."""
        return self.until(count) == 0

    def until(self, count: jax.Array) -> jax.Array:
        """Steps from `count` to the next mask step, 0 on one; int32, large where none follows."""
        never = jnp.iinfo(jnp.int32).max
        if not self.every:
            return jnp.full_like(count, never)
        if self.steps is not None:
            steps = jnp.array(self.steps, jnp.int32)
            return jnp.min(jnp.where(steps >= count, steps - count, never))
        begin = jnp.maximum(count, max(self.first, 1))
        following = (begin + self.every - 1) // self.every * self.every
        return jnp.where(following <= self.last, following - count, never)

    @property
    def all_steps(self) -> Sequence[int]:
        """All mask steps, in order."""
        return (
            _steps_between(self.every, self.first, self.last) if self.steps is None else self.steps
        )

    @property
    def shortest(self) -> int:
        """Fewest steps from one round to the next, or to the first."""
        if self.steps is None:
            return self.every
        return min(b - a for a, b in itertools.pairwise((0, *self.steps)))

    def number(self, count: jax.Array) -> jax.Array:
        """Which round the mask step `count` is, from 1; int32, shape ()."""
        if self.steps is not None:
            return jnp.sum(jnp.array(self.steps, jnp.int32) <= count, dtype=jnp.int32)
        return count // self.every - max(math.ceil(self.first / self.every) - 1, 0)

    def is_last(self, count: jax.Array) -> jax.Array:
        """Whether no round follows the mask step `count`; bool, shape ()."""
        if self.steps is not None:
            return count >= self.steps[-1]
        return count + self.every > self.last

    def k(self, active: int, count: jax.Array) -> jax.Array:
        """How many of a leaf's `active` weights to drop at `count`: floor, at least 1 above 0."""
        return portion(self.fraction(count), active)

    def k_max(self, active: int) -> int:
        """Static upper bound of `k`."""
        return 0 if self.highest <= 0 else min(active, math.floor(self.highest * active) + 1)


def portion(fraction: jax.Array, active: jax.Array | int) -> jax.Array:
    """floor(fraction * active), at least 1 while the fraction is above 0; int32, shape ()."""
    fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0.0, 1.0)
    k = jnp.floor(fraction * jnp.asarray(active, jnp.float32)).astype(jnp.int32)
    return jnp.where(fraction > 0, jnp.maximum(k, 1), 0)


def mask_steps(
    total_steps: int, every: Every | None = 100, start: float = 0.0, stop: float = 0.75
) -> Sequence[int]:
    """The mask steps of `transform` with these arguments: calls of `update`, from 1, in order.

    On the last of them a cosine may have reached zero; then it is an ordinary step. For a
    training loop that has a program without mask steps: `dstee.apply(..., mask_step=step in
    mask_steps)`.

    Args:
      total_steps, every, start, stop: as for `transform`.

    Raises:
      ValueError: one of them is out of range, or there is no mask step.

    Example:
      >>> list(mask_steps(1000, every=200))
      [200, 400, 600]
    """
    if isinstance(total_steps, optax.GradientTransformation):
        raise ValueError(
            "mask_steps takes total_steps, a whole number; mask_steps_of(tx) asks a transformation "
            "for its mask steps."
        )
    if every is None:
        return ()
    return make_rounds(total_steps, optax.constant_schedule(1.0), every, start, stop).all_steps


def _steps_between(every: Every, first: int, last: int) -> Sequence[int]:
    """All mask steps in [first, last], in order."""
    if not callable(every):
        return range(max(every, math.ceil(first / every) * every), last + 1, every)
    steps, step = [], 0
    while (step := step + _whole(every(step))) <= last:
        steps.append(step)
    return [step for step in steps if step >= first]


def _whole(every: int) -> int:
    if not is_number(every) or every < 1 or every != int(every):
        raise ValueError(
            f"every={shown(every)} must be an integer of 1 or more (None for no rounds)."
        )
    return int(every)


def _cosine(highest: float, last: int, count: jax.Array) -> jax.Array:
    """From `highest` at step 0 to zero at step `last`; also under strict dtype promotion."""
    share = jnp.minimum(count.astype(jnp.float32) / last, 1.0)
    return highest / 2 * (1 + jnp.cos(jnp.pi * share))


def make_rounds(
    total_steps: int, drop_fraction: DropFraction, every: Every | None, start: float, stop: float
) -> Rounds:
    """Check the arguments of `transform` that say when and how much, and make a `Rounds`."""
    check_whole("total_steps", total_steps, least=None)
    check_number("start", start, "0.0")
    check_number("stop", stop, "0.75")
    if not callable(drop_fraction):
        check_number("drop_fraction", drop_fraction, "0.3")
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1.")
    if not 0 <= start <= 1 or not 0 <= stop <= 1:
        raise ValueError(f"start={start} and stop={stop} are shares of total_steps, in [0, 1].")
    if stop < start:
        raise ValueError(f"stop={stop} is before start={start}: exchange them.")
    if not callable(drop_fraction) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction={drop_fraction} must be in [0, 1], as 0.3.")
    if every is None:
        no_fraction = optax.constant_schedule(0.0)
        return Rounds(0, 0, 0, no_fraction, highest=0.0, total_steps=total_steps)
    every = every if callable(every) else _whole(every)
    first, last = (
        math.ceil(round(start * total_steps, 6)),
        math.floor(round(stop * total_steps, 6)),
    )
    steps = _steps_between(every, first, last)
    if not steps:
        of_every = f"no multiple of every={every}"
        if callable(every):
            of_every = f"no step of every, whose first is {_whole(every(0))},"
        raise ValueError(
            f"no mask step: {of_every} lies within start={start} and "
            f"stop={stop} of total_steps={total_steps}, which is [{first}, {last}]. Lower every, "
            "widen start and stop, or pass every=None for masks that stay fixed."
        )
    if callable(drop_fraction):
        schedule = drop_fraction
    else:
        schedule = functools.partial(_cosine, drop_fraction, last)
    with jax.ensure_compile_time_eval():
        values = jax.vmap(schedule)(jnp.array(steps, jnp.int32))
        lowest, highest = float(jnp.min(values)), float(jnp.max(values))
    if not 0 <= lowest <= highest <= 1:
        raise ValueError(
            f"the drop_fraction schedule goes from {lowest} to {highest} over the mask steps: "
            "it must stay in [0, 1]."
        )
    if not callable(drop_fraction) and drop_fraction > 0 and highest <= 0:
        raise ValueError(
            f"the only mask step of every={every}, start={start} and stop={stop} is the last "
            f"step {last}, where the cosine has reached zero: lower every or raise stop."
        )
    return Rounds(
        every=1 if callable(every) else every,
        first=first,
        last=last,
        fraction=schedule,
        highest=highest,
        total_steps=total_steps,
        steps=tuple(steps) if callable(every) else None,
    )
