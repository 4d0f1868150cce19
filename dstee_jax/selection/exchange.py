"""What many arrays drop and grow: one search for all drops, one for all that grows."""

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
    """`drop_and_grow` of many arrays: one search for what all of them drop, one for what they grow.

    Arrays for which `top_k` is taken are searched one by one. Growth comes first, since what can
    grow bounds what is dropped; with `regrow` the drop does, since what it drops can grow.

    Args:
      rows: the arrays.
      regrow, selection: as for `drop_and_grow`.

    Returns:
      Their new masks.
    """
    sizes = [size_of(row.mask, tuple(range(row.mask.ndim))) for row in rows]
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
            found[i] = largest_top_k(score, inner, k, k_max)
        else:
            searches[i] = search_of(score, inner, k, selection)
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
