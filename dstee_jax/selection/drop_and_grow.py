"""Drop-and-grow: exact selection of what is dropped and what grows.

Two ways, one result (ties go to the lowest row-major index in both):

* `lax.top_k` on the flattened array: plain, and quick where `k_max` is small.
* bisection: its cost does not depend on k, and on a sharded array only counts travel.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.bisection import INDEX, Keys, Search, chosen, count, ordered_bits
from dstee_jax.selection.parts import Grid, by_part, inner_axes, is_sharded, join, split

Selection = Literal["auto", "top_k", "bisection", "sharded"]
SELECTIONS = get_args(Selection)

# Measured on 2 CPU cores (benchmarks/mask_update.py): up to here `top_k` beats the bisection.
_TOP_K_MAX_SIZE = 65_536
_TOP_K_MAX_K = 256


def check_selection(selection: str) -> None:
    """Raise a ValueError unless the selection is known."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r} is unknown: choose from {SELECTIONS}.")


def largest(score: jax.Array, k: jax.Array, k_max: int, selection: Selection = "auto") -> jax.Array:
    """Mask of the k largest entries of a float array.

    Args:
      score: float array of any shape. Entries of minus infinity must not be wanted: k is at
        most the number of the others. No NaN.
      k: integer scalar in [0, k_max]; may be traced.
      k_max: static bound on k.
      selection: as for `drop_and_grow`.

    Returns:
      A bool array of `score.shape` with exactly k entries set; ties go to the lowest index.
    """
    check_selection(selection)
    if k_max == 0 or score.size == 0:
        return jnp.zeros(score.shape, bool)
    selection = _resolve(selection, score, k_max)
    inner, k = tuple(range(score.ndim)), jnp.asarray(k).astype(INDEX)
    if selection == "top_k":
        return _largest_top_k(score, inner, k, k_max)
    return chosen([_search(score, inner, k, selection)])[0][0]


def _resolve(selection: Selection, x: jax.Array, k_max: int) -> Selection:
    """`'auto'` by size and sharding."""
    if selection != "auto":
        return selection
    small = x.size <= _TOP_K_MAX_SIZE and k_max <= _TOP_K_MAX_K
    return "top_k" if small and not is_sharded(x) else "bisection"


def _search(score: jax.Array, inner: tuple[int, ...], k: jax.Array, selection: Selection) -> Search:
    """For the k largest entries of each part of an array (as `parts.split` cuts it)."""
    keys = Keys(ordered_bits(score), inner, _size(score, inner), selection == "sharded")
    return Search([keys], k)


def _size(x: jax.Array, axes: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, (x.shape[axis] for axis in axes), 1)


def _largest_top_k(score: jax.Array, inner: tuple[int, ...], k: jax.Array, k_max: int) -> jax.Array:
    outer = [axis for axis in range(score.ndim) if axis not in inner]
    moved = score.transpose(*outer, *inner)
    flat = moved.reshape(*moved.shape[: len(outer)], _size(score, inner))
    _, index = lax.top_k(flat, k_max)
    wanted = jnp.arange(k_max, dtype=INDEX) < k[..., None]
    found = jnp.put_along_axis(
        jnp.zeros(flat.shape, bool), index, wanted, axis=-1, inplace=False, mode="promise_in_bounds"
    )
    back = sorted(range(score.ndim), key=[*outer, *inner].__getitem__)
    return found.reshape(moved.shape).transpose(back)


@functools.partial(jax.jit, static_argnames=("k_max", "regrow", "selection"))
def drop_and_grow(
    mask: jax.Array,
    drop_score: jax.Array,
    grow_score: jax.Array,
    k: jax.Array | int,
    *,
    k_max: int,
    k_grow: jax.Array | int | None = None,
    regrow: bool = False,
    selection: Selection = "auto",
) -> jax.Array:
    """Drop k active entries of one mask and grow as many inactive ones.

    Drops the k active entries of lowest `drop_score`, then grows the `k_grow` inactive
    entries of highest `grow_score`. Exact counts; ties go to the lowest row-major index.

    k is clipped to what is possible: `k_max`, the active entries, and (where `k_grow` is not
    given) the inactive entries with a finite grow score, so that the count of the mask never
    changes. An entry with a NaN or infinite grow score is never grown; one with a NaN drop
    score is dropped last.

    Args:
      mask: bool array of any shape, True where a weight is active.
      drop_score: real array of `mask.shape`; low goes first. Compared in float32 (float64 if
        either score is).
      grow_score: real array of `mask.shape`; high goes first. As `drop_score`.
      k: how many to drop, integer scalar, may be traced.
      k_max: static upper bound on k and k_grow.
      k_grow: how many to grow; default as many as were dropped.
      regrow: whether entries dropped in this call may come back in it.
      selection: `'auto'`, `'top_k'`, `'bisection'` or `'sharded'`: same result, different cost.
        `'auto'` takes `top_k` for `k_max` up to 256 in arrays of up to 65,536 entries that are
        not split over Explicit mesh axes, and the bisection elsewhere. `'sharded'` is the
        bisection for arrays that are split over Auto mesh axes, whose types do not say so.

    Returns:
      The new mask, bool, of `mask.shape`.

    Raises:
      ValueError: shapes differ, `mask` is not bool, or `k_max` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([True, True, False, False])
      >>> weight = jnp.array([0.1, 2.0, 0.0, 0.0])
      >>> gradient = jnp.array([9.0, 0.0, 0.3, -0.5])
      >>> drop_and_grow(mask, abs(weight), abs(gradient), 1, k_max=1).tolist()
      [False, True, False, True]

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Algorithm 1.
    """
    check_selection(selection)
    if mask.dtype != bool:
        raise ValueError(f"mask has dtype {mask.dtype}: pass a bool array (mask.astype(bool)).")
    if not mask.shape == jnp.shape(drop_score) == jnp.shape(grow_score):
        raise ValueError(
            f"mask, drop_score and grow_score have shapes {mask.shape}, {jnp.shape(drop_score)} "
            f"and {jnp.shape(grow_score)}: pass three arrays of one shape."
        )
    if k_max < 0:
        raise ValueError(f"k_max={k_max} is negative: pass a bound of 0 or more.")
    row = Exchange(mask, drop_score, grow_score, (1,) * mask.ndim, k, k_grow, k_max)
    return exchange([row], regrow=regrow, selection=selection)[0]


class Exchange(NamedTuple):
    """What one array exchanges, in each of its parts for itself; see `drop_and_grow`."""

    mask: jax.Array
    drop_score: jax.Array
    grow_score: jax.Array
    grid: Grid  # how many parts each axis has
    k: Any  # for each part: a scalar, or with an axis for each axis of more than one part
    k_grow: Any  # as k, or None
    k_max: int  # of a part


def exchange(rows: Sequence[Exchange], *, regrow: bool, selection: Selection) -> list[jax.Array]:
    """`drop_and_grow` of many arrays: one search for what all of them drop, one for what they grow.

    Arrays for which `top_k` is taken are searched one by one.

    Args:
      rows: the arrays.
      regrow, selection: as for `drop_and_grow`.

    Returns:
      Their new masks.
    """
    result = [row.mask for row in rows]
    sizes = [_size(row.mask, tuple(range(row.mask.ndim))) for row in rows]
    able = [i for i, row in enumerate(rows) if min(row.k_max, sizes[i]) > 0]
    turning = [_Turning.of(rows[i], regrow, selection) for i in able]

    def turn(phase: jax.Array, masks: list[jax.Array]) -> list[jax.Array]:
        """Phase 0 turns the worst active entries off, phase 1 the best inactive ones on."""
        found: list[Any] = [None] * len(masks)
        searches = {}
        for i, (row, now) in enumerate(zip(turning, masks, strict=True)):
            score, k = row.score(phase == 0, now), jnp.where(phase == 0, row.k, row.k_grow)
            if row.selection == "top_k":
                found[i] = _largest_top_k(score, row.inner, k, row.k_max)
            else:
                searches[i] = _search(score, row.inner, k, row.selection)
        for i, (mask,) in zip(searches, chosen(list(searches.values())), strict=True):
            found[i] = mask
        return [now ^ new for now, new in zip(masks, found, strict=True)]

    # A loop, not two calls: half the code to compile, and both phases use the same memory.
    masks = lax.fori_loop(0, 2, turn, [row.mask for row in turning]) if able else []
    for i, mask in zip(able, masks, strict=True):
        result[i] = join(mask, rows[i].mask.shape, rows[i].grid)
    return result


class _Turning(NamedTuple):
    """An `Exchange` cut into its parts, with counts that are possible."""

    mask: jax.Array
    drop_score: jax.Array  # float32 or float64
    grow_score: jax.Array
    inner: tuple[int, ...]  # axes within a part
    k: jax.Array
    k_grow: jax.Array
    k_max: int
    regrow: bool
    selection: Selection

    @classmethod
    def of(cls, row: Exchange, regrow: bool, selection: Selection) -> "_Turning":
        """Clip the counts to `k_max`, and to the active and the free entries."""
        inner = inner_axes(row.mask.shape, row.grid)
        scores = [jnp.asarray(x) for x in (row.drop_score, row.grow_score)]
        wide = jnp.float64 if any(x.dtype == jnp.float64 for x in scores) else jnp.float32
        drop, grow = (split(x.astype(wide), row.grid) for x in scores)
        mask = split(row.mask, row.grid)
        k_max = min(row.k_max, _size(mask, inner))
        selection = _resolve(selection, row.mask, k_max)
        sharded = selection == "sharded"
        active, free = count(inner, mask, ~mask & jnp.isfinite(grow), sharded=sharded)

        def clip(k: jax.Array | int, bound: jax.Array) -> jax.Array:
            k = jnp.clip(jnp.asarray(k), 0, k_max).astype(INDEX)
            return by_part(k, mask, inner).clip(max=bound)

        k = clip(row.k, active)
        if row.k_grow is not None:
            k_grow = clip(row.k_grow, free + k if regrow else free)
        else:
            k_grow = k = k if regrow else k.clip(max=free)
        return cls(mask, drop, grow, inner, k, k_grow, k_max, regrow, selection)

    def score(self, dropping: jax.Array, now: jax.Array) -> jax.Array:
        """What is turned first where it is largest; minus infinity where it must not be.

        NaN is dropped last and never grown. A dropped entry without a finite grow score comes
        back only if nothing else is left, which is the same as not having dropped it.
        """
        raw = jnp.where(dropping, -self.drop_score, self.grow_score)
        limits = jnp.finfo(raw.dtype)
        score = jnp.where(jnp.isfinite(raw), raw, -limits.max)
        score = jnp.where(dropping & (raw == jnp.inf), limits.max, score)
        eligible = jnp.where(dropping, self.mask, ~self.mask & jnp.isfinite(raw))
        if self.regrow:
            eligible |= self.mask & ~now
        # Subnormal numbers and -0.0 become 0.0, as CPU arithmetic sees them.
        score = jnp.where(jnp.abs(score) < limits.tiny, jnp.zeros((), raw.dtype), score)
        return jnp.where(eligible, score, -jnp.inf)
