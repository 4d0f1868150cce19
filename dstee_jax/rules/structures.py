"""Structures: which masks are allowed. N:M, tiles, constant fan-in.

`transform(structure=structures.n_m(2, 4), ...)` uses any drop and grow score with masks of that
structure, under `plans.exchange`. They keep the count of every leaf, but for ablation.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dstee_jax.arguments import check_whole, is_number
from dstee_jax.rules import units
from dstee_jax.selection.bisection import largest_bits
from dstee_jax.selection.largest import largest
from dstee_jax.selection.parts import Grid

Shape = tuple[int, ...]


class Structure(NamedTuple):
    """Masks of one kind.

    Attributes:
      count: `(shape, wanted) -> count`, the nearest number of active weights that the structure
        allows; raises a ValueError that names shape and remedy if it allows none.
      random_mask: `(key, shape, count) -> mask`, uniformly at random, as the state keeps it.
      fits: `mask -> bool`, whether a concrete mask has the structure.
      reduce: `(mask, drop_score, grow_score) -> the same of what is exchanged`, as tiles.
      parts: `(shape, k, k_max, active, turn) -> (grid, k, k_max)`: into how many parts each axis
        of what was reduced is cut, and how many entries of a part change places so that about k
        of the active weights do, never all of a part; k gets an axis for each axis of more than
        one part. `turn` is another number in each round, for what does not share out evenly.
      expand: `(mask, shape) -> mask`: the leaf's mask from that of what was reduced.
      step: `shape -> n`: counts of that shape are multiples of n; None if there is one alone.
      tile: (inputs, outputs) of a tile, if masks and counters are kept for tiles; else ().
      exchange: `(mask, drop_score, grow_score, k, k_max, active, name, regrow, selection) -> mask`,
        instead of the three, for a structure whose groups are not parts: about k weights change
        places, of `active` that there are at the asked sparsity. `name` is the leaf's.
      keeps_count: whether a round leaves as many weights active as there were.
    """

    count: Callable[[Shape, int], int]  # type: ignore[assignment]
    random_mask: Callable[[jax.Array, Shape, int], jax.Array]
    fits: Callable[[np.ndarray], bool]
    reduce: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None
    parts: Callable[..., tuple[Grid, jax.Array, int]] | None = None
    expand: Callable[[jax.Array, Shape], jax.Array] | None = None
    exchange: Callable[..., jax.Array] | None = None
    step: Callable[[Shape], int] | None = None
    tile: tuple[int, ...] = ()
    keeps_count: bool = True


def n_m(n: int, m: int, *, axis: int = -2) -> Structure:
    """Exactly n of each m neighbouring weights along an axis are active, as 2:4.

    A round exchanges at most one weight in a group: in the k groups whose worst active weight
    scores lowest, it gives way to the best inactive one of its group. The sparsity must be
    1 - n / m in every leaf: pass `distribution=dstee.uniform`.

    Args:
      n: active weights of a group, in [1, m).
      m: size of a group; must divide the axis.
      axis: along which groups lie; -2 is the input axis of dense and convolution kernels, which
        is what sparse tensor cores need. Where kernels are (outputs, inputs, ...), as Equinox and
        PyTorch have them, it is 1.

    Raises:
      ValueError: n is not in [1, m); in `init`, m does not divide the axis of a leaf, or its
        sparsity is another.

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, for 2:4.
    """
    check_whole("n", n)
    check_whole("m", m)
    check_whole("axis", axis, least=None)
    if not 1 <= n < m:
        raise ValueError(f"{n}:{m} is no N:M structure: n must be in [1, m), as 2:4.")

    def grouped(x: jax.Array) -> jax.Array:
        moved = jnp.moveaxis(x, axis, -1)
        return moved.reshape(*moved.shape[:-1], -1, m)

    def back(x: jax.Array, shape: Shape) -> jax.Array:
        moved = jnp.moveaxis(jnp.zeros(shape, bool), axis, -1).shape
        return jnp.moveaxis(x.reshape(moved), -1, axis)

    def count(shape: Shape, wanted: int) -> int:
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(
                f"{n}:{m} needs axis {axis} of shape {shape} to be a multiple of {m}: choose "
                "another axis or m, or leave the leaf dense with where=."
            )
        allowed = int(np.prod(shape)) * n // m
        if abs(wanted - allowed) > 1:
            raise ValueError(
                f"{n}:{m} keeps {allowed} weights of shape {shape}, the sparsity {wanted}: pass "
                f"sparsity={1 - n / m:g} and distribution=dstee.uniform."
            )
        return allowed

    def random_mask(key: jax.Array, shape: Shape, wanted: int) -> jax.Array:
        draw = grouped(jax.random.uniform(key, shape))
        rank = jnp.argsort(jnp.argsort(draw, axis=-1), axis=-1)
        return back(rank < n, shape)

    def exchange(mask, drop_score, grow_score, k, k_max, active, name, regrow, selection):
        active, drop, grow = (grouped(x) for x in (mask, drop_score, grow_score))
        places = lax.broadcasted_iota(jnp.int32, active.shape, active.ndim - 1)
        drop = jnp.where(active, drop, jnp.inf)
        worst = places == jnp.argmin(drop, -1, keepdims=True).astype(jnp.int32)
        able = ~active & jnp.isfinite(grow)
        able = able | worst if regrow else able
        best = places == jnp.argmax(jnp.where(able, grow, -jnp.inf), -1, keepdims=True).astype(
            jnp.int32
        )
        # Groups that can exchange, lowest drop score first.
        score = jnp.where(able.any(-1), -drop.min(-1), -jnp.inf)
        k = jnp.minimum(jnp.asarray(k, jnp.uint32), jnp.sum(able.any(-1), dtype=jnp.uint32))
        chosen = largest(score, k, min(k_max, score.size), selection)[..., None]
        return back(jnp.where(chosen, (active & ~worst) | best, active), mask.shape)

    def fits(mask: np.ndarray) -> bool:
        shape = mask.shape
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            return False
        moved = np.moveaxis(mask, axis, -1)
        return bool((moved.reshape(-1, m).sum(-1) == n).all())

    return Structure(count, random_mask, fits, exchange=exchange)


def tiles(
    tile: tuple[int, int] = (32, 32), *, score: Callable[..., jax.Array] = jnp.sum
) -> Structure:
    """Tiles of weights are active or inactive together, as many in each column of tiles.

    A kernel's input axis (-2) is cut in pieces of `tile[0]` and its output axis (-1) in pieces of
    `tile[1]`; a convolution's other axes belong to the tile. The active part of a kernel is then
    a dense array, and training with `dstee.matmul` takes less time (`dstee.tiles`). A round
    exchanges as many tiles in each column, or one more in some. Masks and counters are kept for
    tiles: of shape (..., inputs / tile[0], outputs / tile[1]), 1 for each of a convolution's
    other axes.

    Args:
      tile: (inputs, outputs); must divide the last two axes of every sparse leaf. Small against
        the layer: docs/speed.md says what tiles save and cost.
      score: `(scores, axis) -> score` of a tile, from its weights'; a sum by default.

    Raises:
      ValueError: `tile` is not two sizes of 1 or more; in `init`, it does not divide a leaf.

    References:
      Gray et al., "GPU Kernels for Block-Sparse Weights", 2017, for blocks of weights; here a
      column of tiles keeps its count, as a unit does in constant fan-in.
    """
    pair = isinstance(tile, Sequence | np.ndarray) and len(tile) == 2
    if not pair or any(not is_number(n) or n != int(n) or n < 1 for n in tile):
        raise ValueError(f"tiles={tile!r} must be two sizes of 1 or more, as (32, 32).")

    def cut(shape: Shape) -> Shape:
        """The axes before the last two, then (rows of tiles, inputs, columns, outputs)."""
        if len(shape) < 2 or shape[-2] % tile[0] or shape[-1] % tile[1]:
            raise ValueError(
                f"tiles of {tile} do not divide the last two axes of shape {shape}: choose "
                "another tile, or leave the leaf dense with where=."
            )
        return (*shape[:-2], shape[-2] // tile[0], tile[0], shape[-1] // tile[1], tile[1])

    def kept(shape: Shape) -> Shape:
        *others, rows, _, columns, _ = cut(shape)
        return (*(1 for _ in others), rows, columns)

    def step(shape: Shape) -> int:
        return math.prod(shape) // kept(shape)[-2]

    def of_tiles(x: jax.Array, how: Callable[..., jax.Array]) -> jax.Array:
        others = tuple(range(x.ndim - 2))
        return how(x.reshape(cut(x.shape)), axis=(*others, -3, -1)).reshape(kept(x.shape))

    def count(shape: Shape, wanted: int) -> int:
        return step(shape) * min(max(round(wanted / step(shape)), 1), kept(shape)[-2])

    def random_mask(key: jax.Array, shape: Shape, wanted: int) -> jax.Array:
        *_, rows, columns = kept(shape)
        bits = jax.random.bits(key, (columns, rows), jnp.uint32)
        k = jnp.uint32(wanted // step(shape))
        found = jax.vmap(lambda column: largest_bits([column], k)[0])(bits)
        return found.T.reshape(kept(shape))

    def reduce(mask, drop_score, grow_score):
        return of_tiles(mask, jnp.any), of_tiles(drop_score, score), of_tiles(grow_score, score)

    def parts(shape, k, k_max, active, turn) -> tuple[Grid, jax.Array, int]:
        *ones, _, columns = kept(shape)
        each = step(shape) // columns
        k = _shared(k // each, columns, active // each, turn, some=k > 0)
        return (*ones, 1, columns), k, -(-k_max // step(shape))

    def fits(mask: np.ndarray) -> bool:
        try:
            *others, rows, columns = kept(mask.shape)
        except ValueError:
            return False
        axes = (*range(len(others)), -3, -1)
        boxes = mask.reshape(cut(mask.shape))
        some, every = boxes.any(axis=axes), boxes.all(axis=axes)
        sums = some.reshape(rows, columns).sum(0)
        return bool((some == every).all() and (sums == sums[0]).all())

    return Structure(
        count, random_mask, fits, reduce, parts, lambda mask, _: mask, step=step, tile=tuple(tile)
    )


def constant_fan_in(*, output_axis: int = -1) -> Structure:
    """Every output unit keeps the same number of active inputs: SRigL.

    A round exchanges as many weights in each unit, or one more in some.

    Args:
      output_axis: of the units: -1 for kernels (..., inputs, outputs), as Flax has them, 0 for
        (outputs, inputs, ...), as Equinox and PyTorch have them.

    References:
      Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2024, Section 3.

    Deviations:
      SRigL also ablates units whose weights matter little: `ablation`. Here all units stay.
    """
    check_whole("output_axis", output_axis, least=None)

    def back(x: jax.Array, shape: Shape) -> jax.Array:
        return units.from_columns(x, shape, output_axis)

    def count(shape: Shape, wanted: int) -> int:
        n, fan_in = units.output_units(shape, output_axis), units.fan_in(shape, output_axis)
        return n * min(max(round(wanted / n), 1), fan_in)

    def random_mask(key: jax.Array, shape: Shape, wanted: int) -> jax.Array:
        n, fan_in = units.output_units(shape, output_axis), units.fan_in(shape, output_axis)
        bits = jax.random.bits(key, (fan_in, n), jnp.uint32).T
        return back(jax.vmap(lambda b: largest_bits([b], jnp.uint32(wanted // n))[0])(bits), shape)

    def parts(shape, k, k_max, active, turn) -> tuple[Grid, jax.Array, int]:
        n = units.output_units(shape, output_axis)
        inputs = units.input_axes(shape, output_axis)
        grid = tuple(1 if axis in inputs else n for axis in range(len(shape)))
        return grid, _shared(k, n, active, turn, some=k > 0), -(-k_max // n)

    def fits(mask: np.ndarray) -> bool:
        sums = mask.sum(units.input_axes(mask.shape, output_axis))
        return bool((sums == sums[0]).all())

    def same(*arrays):
        return arrays

    def step(shape: Shape) -> int:
        return units.output_units(shape, output_axis)

    return Structure(count, random_mask, fits, same, parts, lambda mask, _: mask, step=step)


def _shared(
    k: jax.Array, parts: int, active: int, turn: jax.Array, *, some: jax.Array
) -> jax.Array:
    """How many of k entries, at least one if `some`, each of the parts exchanges.

    Equally many, and one more in as many parts as remain, from another one on in each round. A
    part never loses all that it has: what grows starts at zero, and a unit that lost all its
    weights would be dead, and with every unit the layer.

    Args:
      k: int32, any shape.
      parts: how many parts.
      active: entries that all parts together have; equally many each.
      turn: int32, another number in each round.
      some: bool, the shape of k.

    Returns:
      int32, the shape of k and, if there are several parts, an axis of them.
    """
    most = max(active // parts - 1, 0)
    k = jnp.clip(jnp.maximum(k, some.astype(k.dtype)), 0, most * parts).astype(jnp.int32)
    if parts == 1:
        return k
    every, more = k // parts, k % parts
    # Multiples of the golden section spread the turns.
    first = turn.astype(jnp.uint32) * jnp.uint32(2654435769) % jnp.uint32(parts)
    place = (jnp.arange(parts, dtype=jnp.int32) - first.astype(jnp.int32)) % parts
    place = place.reshape((1,) * k.ndim + (parts,))
    return every[..., None] + (place < more[..., None]).astype(jnp.int32)
