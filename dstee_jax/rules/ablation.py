"""Constant fan-in with ablation: units of little use lose all their weights, others get them."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.arguments import check_flag, check_function, check_number
from dstee_jax.rules import units
from dstee_jax.rules.structures import Shape, Structure, constant_fan_in
from dstee_jax.selection.exchange import Exchange
from dstee_jax.selection.exchange import exchange as exchange_all
from dstee_jax.selection.largest import largest

Exempt: TypeAlias = Callable[[str, Shape], bool]


def ablation(
    gamma: float = 0.3,
    *,
    of_dense: bool = False,
    exempt: Exempt = lambda name, shape: False,
    output_axis: int = -1,
) -> Structure:
    """Every output unit has the same number of active inputs, or none: SRigL.

    A layer starts with k0 active inputs in each unit, T in all. In a round in which k weights
    move, the salient weights are the active ones but for the k of lowest drop score, and the k
    places of highest growth score, active or not. Units with fewer than max(1, floor(gamma k0))
    salient weights are ablated, anew in each round, so that a unit may come back; at least
    T / fan-in units stay. Those left have T / (their number) inputs each, rounded down: the salient
    active weights, the largest of them where they are more, and the places of highest growth score
    where they are fewer, also those just dropped.

    So the count of a layer follows from the number of its units, and is at most T; `packed=True`
    and `indices=True` need one that stays. What follows a layer still sees the bias
    of an ablated unit; `dstee.shrink` takes such units out.

    Args:
      gamma: share of k0 that must be salient, in [0, 1); from 1 on a number of weights. 0 ablates
        units without any salient weight.
      of_dense: gamma is a share of the dense fan-in, not of k0.
      exempt: `(name, shape) -> bool` of a leaf, as 'head/kernel' and (128, 10): whether all its
        units stay. Those of the last layer must, or classes are lost.
      output_axis: as for `constant_fan_in`.

    Raises:
      ValueError: gamma is negative, or another argument is of another kind.

    References:
      Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2024, Section 3.1, and its
      code.

    Deviations:
      k0 is rounded to the nearest, theirs down. k is a share of T, theirs of the weights that are
      active now. A unit with more weights than its share loses the lowest, theirs any. At least
      one unit stays.
    """
    check_number("gamma", gamma, "0.3")
    check_flag("of_dense", of_dense)
    example = "lambda name, shape: 'head' in name"
    check_function("exempt", exempt, "a leaf's name and shape", example, inputs=2)
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be 0 or more, as 0.3: a share of the fan-in.")
    alike = constant_fan_in(output_axis=output_axis)

    def exchange(mask, drop_score, grow_score, k, k_max, active, name, regrow, selection):
        shape, size = mask.shape, mask.size
        n, fan_in = units.output_units(shape, output_axis), units.fan_in(shape, output_axis)
        inputs = units.input_axes(shape, output_axis)
        top, low = jnp.finfo(drop_score.dtype).max, jnp.finfo(grow_score.dtype).min
        weight = jnp.where(mask, jnp.nan_to_num(drop_score, nan=top), -jnp.inf)
        growth = jnp.where(jnp.isfinite(grow_score), grow_score, low)
        there = _count(mask)
        keep = there - jnp.minimum(k, there)

        salient = largest(weight, keep, size, selection) | largest(growth, k, size, selection)
        live = _live(
            _count(salient, inputs), least=max(active // fan_in, 1), few=few(n, fan_in, active)
        )
        live = jnp.ones_like(live) if exempt(name, shape) else live
        each = jnp.minimum(active // _count(live), fan_in)
        of_live = jnp.expand_dims(live, inputs)

        keep = jnp.minimum(keep, _count(mask & of_live))
        stays = largest(jnp.where(of_live, weight, -jnp.inf), keep, size, selection)
        over = _count(stays, inputs) - jnp.where(live, each, 0)
        grid = tuple(1 if axis in inputs else n for axis in range(len(shape)))
        move = [jnp.maximum(x, 0).reshape([p for p in grid if p > 1]) for x in (over, -over)]
        row = Exchange(stays, drop_score, growth, grid, *move, fan_in)
        new = exchange_all([row], regrow=False, selection=selection)[0]
        return jnp.where(jnp.isfinite(grow_score).any(), new, mask)

    def few(n: int, fan_in: int, active: int) -> int:
        share = gamma * (fan_in if of_dense else active // n) if gamma < 1 else gamma
        return max(1, int(share))

    def fits(mask: np.ndarray) -> bool:
        sums = mask.sum(units.input_axes(mask.shape, output_axis))
        return len(set(sums[sums > 0].tolist())) == 1

    return alike._replace(
        fits=fits, reduce=None, parts=None, expand=None, exchange=exchange, keeps_count=False
    )


def _live(salient: jax.Array, *, least: int, few: int) -> jax.Array:
    """Units with `few` salient weights or more, or with as many as the `least` best of them."""
    nth = jnp.sort(salient)[salient.size - least]
    return salient >= jnp.minimum(nth, few)


def _count(mask: jax.Array, axes: Shape | None = None) -> jax.Array:
    return jnp.sum(mask, axis=axes, dtype=jnp.int32)
