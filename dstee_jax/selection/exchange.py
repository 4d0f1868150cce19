"""What many arrays drop and grow: one search for both, in all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dstee_jax.selection.bisection import INDEX, chosen, count, ordered_bits
from dstee_jax.selection.largest import Selection, largest_top_k, resolve, search_of, size_of
from dstee_jax.selection.parts import Grid, by_part, inner_axes, join, split


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
    """`drop_and_grow` of many arrays: one search for what all of them drop and what they grow.

    With `regrow` there are two, since what is dropped can grow. Arrays for which `top_k` is taken
    are searched one by one.

    Args:
      rows: the arrays.
      regrow, selection: as for `drop_and_grow`.

    Returns:
      Their new masks.
    """
    sizes = [size_of(row.mask, tuple(range(row.mask.ndim))) for row in rows]
    able = [i for i, row in enumerate(rows) if min(row.k_max, sizes[i]) > 0]
    cut = [_Cut.of(rows[i], selection) for i in able]
    changing = _one_after_the_other(cut) if regrow else _at_once(cut)
    result = [row.mask for row in rows]
    for i, c, changes in zip(able, cut, changing, strict=True):
        result[i] = join(c.mask ^ changes, rows[i].mask.shape, rows[i].grid)
    return result


def _at_once(cut: "Sequence[_Cut]") -> list[jax.Array]:
    """Where masks change: what is dropped is active, what grows is not, one array holds both."""
    changing: list[Any] = [None] * len(cut)
    searches = {}
    for i, c in enumerate(cut):
        score = jnp.where(c.mask, c.to_drop(), c.to_grow())
        active, free = c.counted(c.mask, ~c.mask & _able(score))
        drop = c.clip(c.k, active)
        grow = (drop if c.k_grow is None else c.clip(c.k_grow, free)).clip(max=free)
        drop = grow if c.k_grow is None else drop
        if c.selection == "top_k":
            worst, best = jnp.where(c.mask, score, -jnp.inf), jnp.where(c.mask, -jnp.inf, score)
            pair = [largest_top_k(x, c.inner, k, c.k_max) for x, k in ((worst, drop), (best, grow))]
            changing[i] = pair[0] | pair[1]
        else:
            k = jnp.stack([grow, drop])  # of what is inactive, of what is active
            searches[i] = search_of(score, c.inner, k, c.selection, side=c.mask)
    for i, (mask,) in zip(searches, chosen(list(searches.values())), strict=True):
        changing[i] = mask
    return changing


def _one_after_the_other(cut: "Sequence[_Cut]") -> list[jax.Array]:
    """Where masks change, if what is dropped can grow."""
    worst = [jnp.where(c.mask, c.to_drop(), -jnp.inf) for c in cut]
    active = [c.counted(c.mask)[0] for c in cut]
    drops = [c.clip(c.k, n) for c, n in zip(cut, active, strict=True)]
    dropped = _best(cut, worst, drops)
    scores = [c.to_grow(gone) for c, gone in zip(cut, dropped, strict=True)]
    free = [c.counted(_able(score))[0] for c, score in zip(cut, scores, strict=True)]
    grows = [
        (k if c.k_grow is None else c.clip(c.k_grow, n)).clip(max=n)
        for c, k, n in zip(cut, drops, free, strict=True)
    ]
    grown = _best(cut, scores, grows)
    return [gone ^ new for gone, new in zip(dropped, grown, strict=True)]


def _best(
    cut: "Sequence[_Cut]", scores: Sequence[jax.Array], counts: Sequence[jax.Array]
) -> list[jax.Array]:
    """Masks of the entries of highest score in each array: one search for all but `top_k`."""
    found: list[Any] = [None] * len(cut)
    searches = {}
    for i, (c, score, k) in enumerate(zip(cut, scores, counts, strict=True)):
        if c.selection == "top_k":
            found[i] = largest_top_k(score, c.inner, k, c.k_max)
        else:
            searches[i] = search_of(score, c.inner, k, c.selection)
    for i, (mask,) in zip(searches, chosen(list(searches.values())), strict=True):
        found[i] = mask
    return found


def _able(score: jax.Array) -> jax.Array:
    """Which entries can grow: by their keys, which are wanted anyway."""
    return ordered_bits(score) > ordered_bits(jnp.array(-jnp.inf, score.dtype))


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
        k_max = min(row.k_max, size_of(mask, inner))
        how = resolve(selection, row.mask, k_max)
        return cls(mask, drop, grow, inner, row.k, row.k_grow, k_max, how)

    def clip(self, k: jax.Array | int, bound: jax.Array) -> jax.Array:
        """A count for each part, from 0 to `k_max` and the bound."""
        k = jnp.clip(jnp.asarray(k), 0, self.k_max).astype(INDEX)
        return by_part(k, self.mask, self.inner).clip(max=bound)

    def counted(self, *entries: jax.Array) -> tuple[jax.Array, ...]:
        """How many entries of each part are True in each array."""
        return count(self.inner, *entries, sharded=self.selection == "sharded")

    def to_drop(self) -> jax.Array:
        """The score of dropping an entry, if it is active; NaN goes last."""
        raw = -self.drop_score
        return jnp.where(raw == jnp.inf, jnp.finfo(raw.dtype).max, _finite(raw))

    def to_grow(self, dropped: jax.Array | None = None) -> jax.Array:
        """The score of growing what may grow, minus infinity elsewhere.

        A dropped entry without a finite score comes back only if nothing else is left, which is
        the same as not having dropped it.
        """
        eligible = ~self.mask & jnp.isfinite(self.grow_score)
        eligible = eligible if dropped is None else eligible | dropped
        return jnp.where(eligible, _finite(self.grow_score), -jnp.inf)


def _finite(score: jax.Array) -> jax.Array:
    """A score without infinities and NaN, which become the lowest one.

    Subnormal numbers and -0.0 become 0.0, as CPU arithmetic sees them.
    """
    limits = jnp.finfo(score.dtype)
    score = jnp.where(jnp.isfinite(score), score, -limits.max)
    return jnp.where(jnp.abs(score) < limits.tiny, jnp.zeros((), score.dtype), score)
