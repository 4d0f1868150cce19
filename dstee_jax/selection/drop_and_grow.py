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
    wanted = lax.broadcasted_iota(INDEX, index.shape, index.ndim - 1) < k[..., None]
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

    Arrays for which `top_k` is taken are searched one by one. Growth comes first, since what can
    grow bounds what is dropped; with `regrow` the drop does, since what it drops can grow.

    Args:
      rows: the arrays.
      regrow, selection: as for `drop_and_grow`.

    Returns:
      Their new masks.
    """
    sizes = [_size(row.mask, tuple(range(row.mask.ndim))) for row in rows]
    able = [i for i, row in enumerate(rows) if min(row.k_max, sizes[i]) > 0]
    cut = [_Cut.of(rows[i], selection) for i in able]
    if regrow:
        active = [c.counted(c.mask)[0] for c in cut]
        drops = [c.clip(c.k, n) for c, n in zip(cut, active, strict=True)]
        dropped = _best([c.worst(k) for c, k in zip(cut, drops, strict=True)])
        growing = [c.to_grow(gone) for c, gone in zip(cut, dropped, strict=True)]
        free = [c.counted(c.able(score))[0] for c, score in zip(cut, growing, strict=True)]
    else:
        growing = [c.to_grow(None) for c in cut]
        counts = [c.counted(c.mask, c.able(score)) for c, score in zip(cut, growing, strict=True)]
        drops = [c.clip(c.k, n) for c, (n, _) in zip(cut, counts, strict=True)]
        free = [n for _, n in counts]
    grows = [
        (k if c.k_grow is None else c.clip(c.k_grow, n)).clip(max=n)
        for c, k, n in zip(cut, drops, free, strict=True)
    ]
    grown = _best([c.best(*row) for c, *row in zip(cut, growing, grows, strict=True)])
    if not regrow:
        drops = [g if c.k_grow is None else k for c, k, g in zip(cut, drops, grows, strict=True)]
        # Said with what has grown, though it is inactive: so the drop waits for the growth, whose
        # keys leave it their memory.
        waiting = [c._replace(mask=c.mask & ~new) for c, new in zip(cut, grown, strict=True)]
        dropped = _best([c.worst(k) for c, k in zip(waiting, drops, strict=True)])
    result = [row.mask for row in rows]
    for i, c, gone, new in zip(able, cut, dropped, grown, strict=True):
        result[i] = join((c.mask & ~gone) | new, rows[i].mask.shape, rows[i].grid)
    return result


class _Best(NamedTuple):
    """The k entries of highest score that are looked for in each part of an array."""

    score: jax.Array
    inner: tuple[int, ...]  # axes within a part
    k: jax.Array
    k_max: int
    selection: Selection


def _best(wanted: Sequence[_Best]) -> list[jax.Array]:
    """Masks of what is looked for: one search for all but those for which `top_k` is taken."""
    found: list[Any] = [None] * len(wanted)
    searches = {}
    for i, (score, inner, k, k_max, selection) in enumerate(wanted):
        if selection == "top_k":
            found[i] = _largest_top_k(score, inner, k, k_max)
        else:
            searches[i] = _search(score, inner, k, selection)
    for i, (mask,) in zip(searches, chosen(list(searches.values())), strict=True):
        found[i] = mask
    return found


class _Cut(NamedTuple):
    """An `Exchange` cut into its parts."""

    mask: jax.Array
    drop_score: jax.Array  # float32 or float64
    grow_score: jax.Array
    inner: tuple[int, ...]  # axes within a part
    k: Any
    k_grow: Any
    k_max: int
    selection: Selection

    @classmethod
    def of(cls, row: Exchange, selection: Selection) -> "_Cut":
        """Split the arrays by the grid."""
        inner = inner_axes(row.mask.shape, row.grid)
        scores = [jnp.asarray(x) for x in (row.drop_score, row.grow_score)]
        wide = jnp.float64 if any(x.dtype == jnp.float64 for x in scores) else jnp.float32
        mask, drop, grow = (
            split(x, row.grid) for x in (row.mask, *(x.astype(wide) for x in scores))
        )
        k_max = min(row.k_max, _size(mask, inner))
        how = _resolve(selection, row.mask, k_max)
        return cls(mask, drop, grow, inner, row.k, row.k_grow, k_max, how)

    def clip(self, k: jax.Array | int, bound: jax.Array) -> jax.Array:
        """A count for each part, from 0 to `k_max` and the bound."""
        k = jnp.clip(jnp.asarray(k), 0, self.k_max).astype(INDEX)
        return by_part(k, self.mask, self.inner).clip(max=bound)

    def counted(self, *entries: jax.Array) -> tuple[jax.Array, ...]:
        """How many entries of each part are True in each array."""
        return count(self.inner, *entries, sharded=self.selection == "sharded")

    def able(self, score: jax.Array) -> jax.Array:
        """Which entries can grow: by their keys, which are wanted anyway."""
        return ordered_bits(score) > ordered_bits(jnp.array(-jnp.inf, score.dtype))

    def worst(self, k: jax.Array) -> _Best:
        """The k active entries of lowest drop score; NaN goes last."""
        raw = -self.drop_score
        score = jnp.where(raw == jnp.inf, jnp.finfo(raw.dtype).max, _finite(raw))
        score = jnp.where(self.mask, score, -jnp.inf)
        return _Best(score, self.inner, k, self.k_max, self.selection)

    def to_grow(self, dropped: jax.Array | None) -> jax.Array:
        """The grow score of what may grow, minus infinity elsewhere.

        A dropped entry without a finite score comes back only if nothing else is left, which is
        the same as not having dropped it.
        """
        eligible = ~self.mask & jnp.isfinite(self.grow_score)
        eligible = eligible if dropped is None else eligible | dropped
        return jnp.where(eligible, _finite(self.grow_score), -jnp.inf)

    def best(self, score: jax.Array, k: jax.Array) -> _Best:
        """The k entries of highest score."""
        return _Best(score, self.inner, k, self.k_max, self.selection)


def _finite(score: jax.Array) -> jax.Array:
    """A score without infinities and NaN, which become the lowest one.

    Subnormal numbers and -0.0 become 0.0, as CPU arithmetic sees them.
    """
    limits = jnp.finfo(score.dtype)
    score = jnp.where(jnp.isfinite(score), score, -limits.max)
    return jnp.where(jnp.abs(score) < limits.tiny, jnp.zeros((), score.dtype), score)
