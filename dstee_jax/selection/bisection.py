"""Exact selection of the k largest entries, bit by bit, with counting passes.

The cost does not depend on k, k may be traced, and on sharded arrays only counts travel.
Several arrays may be searched as one, one array part by part, and many searches in one loop.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.parts import by_part, is_sharded, sharding_of, varying_axes

INDEX = jnp.uint32  # of counts and indices: up to 2**32 - 1 entries of a part

# Bytes of keys that are searched in one loop, where nothing is split over devices. A loop goes on
# for the array of it that takes longest, as one with ties does, and reads all of them in each
# pass, up to here from a CPU's caches. An array is never cut for it.
CACHED = 2**24


def ordered_bits(score: jax.Array) -> jax.Array:
    """Map floats to unsigned integers of the same order (float32 -> uint32)."""
    unsigned = jnp.uint64 if score.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(score, unsigned)
    sign = jnp.array(1 << (8 * bits.dtype.itemsize - 1), unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def linear_index(shape: tuple[int, ...], axes: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Row-major index along `axes`, built without a reshape (which would gather)."""
    sharding = sharding_of(like)
    index = jnp.zeros(shape, INDEX, out_sharding=sharding)
    stride = 1
    for axis in reversed(axes):
        along = lax.broadcasted_iota(INDEX, shape, axis, out_sharding=sharding)
        index += along * jnp.array(stride, INDEX)
        stride *= shape[axis]
    return index


def count(
    axes: tuple[int, ...], *predicates: jax.Array, sharded: bool = False
) -> tuple[jax.Array, ...]:
    """How many entries of each bool array are True along axes: one pass over all of them.

    One variadic reduce, which XLA vectorises on CPU where it does not a plain sum of bools: one
    array is counted in two halves. Between devices it would be an all-gather of every device's
    counts; so axes that are split are summed by themselves, which is an all-reduce. Explicit
    mesh axes are seen in the type; for Auto ones `sharded` says it, and all sums are plain.
    """
    if len(predicates) == 1 and axes and not sharded:
        (single,) = predicates
        place = lax.broadcasted_iota(
            INDEX, single.shape, axes[-1], out_sharding=sharding_of(single)
        )
        odd = (place & jnp.ones((), INDEX)).astype(bool)
        return (functools.reduce(jnp.add, count(axes, single & odd, single & ~odd)),)
    ones = tuple(p.astype(INDEX) for p in predicates)
    spec = jax.typeof(ones[0]).sharding.spec
    apart = axes if sharded else tuple(axis for axis in axes if spec[axis] is not None)
    within = tuple(axis for axis in axes if axis not in apart)

    def add(x: tuple, y: tuple) -> tuple:
        return tuple(a + b for a, b in zip(x, y, strict=True))

    if within:
        ones = tuple(lax.reduce(ones, (jnp.zeros((), INDEX),) * len(ones), add, within))
    left = tuple(axis - sum(w < axis for w in within) for axis in apart)
    return tuple(jnp.sum(x, axis=left, dtype=INDEX) for x in ones) if left else ones


class Keys(NamedTuple):
    """One array of unsigned keys, cut into parts.

    With `side`, each part is two: what is False and what is True there, whose entries lie among
    each other. What is said of each part then has a first axis of those two.
    """

    bits: jax.Array  # `parts.split` of the array
    inner: tuple[int, ...]  # its axes within a part
    size: int  # entries of a part
    sharded: bool = False  # whether it is split over Auto mesh axes
    side: jax.Array | None = None  # bool, as `bits`

    def entries(self, test: Callable[..., jax.Array], *per_part: jax.Array) -> jax.Array:
        """Which entries pass a test against the values of their part: bool, as the bits."""
        if self.side is None:
            return test(*map(self._broadcast, per_part))
        off, on = (test(*(self._broadcast(v[i]) for v in per_part)) for i in (0, 1))
        return (off & ~self.side) | (on & self.side)

    def counts(
        self, test: Callable[..., jax.Array], values: Sequence[tuple[jax.Array, ...]]
    ) -> tuple[jax.Array, ...]:
        """How many entries of each part pass a test against each of some values for it."""
        if self.side is None:
            entries = [test(*map(self._broadcast, per_part)) for per_part in values]
            return count(self.inner, *entries, sharded=self.sharded)
        # Each side by its own values: a select between them would be computed entry by entry.
        entries = [
            test(*(self._broadcast(v[i]) for v in per_part)) & side
            for per_part in values
            for i, side in enumerate((~self.side, self.side))
        ]
        flat = count(self.inner, *entries, sharded=self.sharded)
        return tuple(jnp.stack(pair) for pair in zip(flat[::2], flat[1::2], strict=True))

    def _broadcast(self, per_part: jax.Array) -> jax.Array:
        return jnp.expand_dims(per_part, self.inner) if per_part.ndim else per_part


class Search(NamedTuple):
    """The k largest of some keys, in each part for itself."""

    keys: Sequence[Keys]  # cut into the same parts, and searched as one array
    # INDEX, with an axis for each axis that counts parts, and before them one of two if the keys
    # have a side (False first). At most the entries that there are.
    k: jax.Array

    @property
    def size(self) -> int:
        """Entries of a part, of all keys together."""
        return sum(key.size for key in self.keys)


class Found(NamedTuple):
    """For each part of a search: a threshold that at least k entries reach, and no smaller set."""

    threshold: jax.Array
    reached: jax.Array  # INDEX: how many entries are at least the threshold
    above: jax.Array  # INDEX: how many are above it; exact unless reached == k


# How many entries of each part reach each of three thresholds.
_Reaching = Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]


def chosen(searches: Sequence[Search]) -> list[list[jax.Array]]:
    """Masks of the k largest entries of each search (in each part of it).

    In one loop for all that are known to be split over devices, whose counts then travel together;
    else in one for as many as caches hold.

    Args:
      searches: of keys of one dtype.

    Returns:
      For each search a bool array for each of its keys, shaped as its bits. Ties go to the first
      array and the lowest row-major index of the part.
    """
    searches = [s._replace(k=by_part(s.k, s.keys[0].bits, s.keys[0].inner)) for s in searches]
    return [masks for group in _loops(searches) for masks in _chosen(group)]


def _loops(searches: Sequence[Search]) -> list[list[Search]]:
    """Searches that share a loop, in order."""
    if not searches:
        return []
    if any(key.sharded or is_sharded(key.bits) for s in searches for key in s.keys):
        return [list(searches)]
    groups: list[list[Search]] = []
    left = 0
    for search in searches:
        size = sum(key.bits.size * key.bits.dtype.itemsize for key in search.keys)
        if not groups or size > left:
            groups.append([])
            left = CACHED
        groups[-1].append(search)
        left -= size
    return groups


def _chosen(searches: list[Search]) -> list[list[jax.Array]]:
    wanted = [s.k for s in searches]
    bits = 8 * searches[0].keys[0].bits.dtype.itemsize
    found = _bisect([_start(s) for s in searches], wanted, list(map(_reaching, searches)), bits)

    def lowest_index() -> list[jax.Array]:
        # A part without ties has its k already (then `above` may not be exact): all its entries.
        everything = [jnp.full_like(s.k, s.size) for s in searches]
        left = [
            jnp.where(f.reached == k, n, k - f.above)
            for f, k, n in zip(found, wanted, everything, strict=True)
        ]
        counting = [_reaching_ties(*row) for row in zip(searches, found, strict=True)]
        bits = max(s.size for s in searches).bit_length()
        start = [_start(s, INDEX) for s in searches]
        return [f.threshold for f in _bisect(start, left, counting, bits)]

    unique = ~_any([jnp.any(f.reached != k) for f, k in zip(found, wanted, strict=True)])
    first = lax.cond(unique, lambda: [jnp.zeros_like(f.above) for f in found], lowest_index)
    return [_at_least(*row) for row in zip(searches, found, first, strict=True)]


def _bisect(
    found: list[Found],
    wanted: list[jax.Array],
    reaching: list[_Reaching],
    bits: int,
) -> list[Found]:
    """Find the k-th largest entry of each part of each search, of all searches in one loop.

    Fixes two bits a pass, from the top, and stops early once exactly k entries are reached
    everywhere. On devices the counts of all searches travel together.

    Args:
      found: where to begin, for each search.
      wanted: k of each.
      reaching: counts for each.
      bits: of the thresholds.

    Returns:
      For each search: `reached == k`, or `reached > k` and `threshold` is the k-th largest value,
      whose ties are still to be broken.
    """

    def unfinished(carry: tuple[jax.Array, list[Found]]) -> jax.Array:
        shift, found = carry
        missing = [jnp.any(f.reached != k) for f, k in zip(found, wanted, strict=True)]
        return (shift >= 0) & _any(missing)

    def two_bits(carry: tuple[jax.Array, list[Found]]) -> tuple[jax.Array, list[Found]]:
        shift, found = carry
        rows = zip(found, wanted, reaching, strict=True)
        return shift - 2, [_narrow(*row, shift) for row in rows]

    first = jnp.int32(bits + bits % 2 - 2)
    return lax.while_loop(unfinished, two_bits, (first, found))[1]


def _narrow(found: Found, k: jax.Array, reaching: _Reaching, shift: jax.Array) -> Found:
    """A threshold with two more bits, at `shift`."""
    threshold, reached, above = found
    dtype = threshold.dtype
    step = jnp.left_shift(jnp.array(1, dtype), shift.astype(dtype))
    tries = tuple(threshold + step * jnp.array(j, dtype) for j in (1, 2, 3))
    counts = reaching(tries)
    for candidate, n in zip(tries, counts, strict=True):
        threshold = jnp.where(n >= k, candidate, threshold)
        reached = jnp.where(n >= k, n, reached)
    for n in reversed(counts):
        above = jnp.where(n < k, n, above)
    return Found(threshold, reached, above)


def _start(search: Search, dtype: Any = None) -> Found:
    """The threshold zero, which all entries reach. A side has fewer; none has the key zero.

    In the type of what is counted: under shard_map, varying over the same mesh axes.
    """
    axes = functools.reduce(lambda a, b: a | b, [varying_axes(key.bits) for key in search.keys])

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    zeros = vary(jnp.zeros_like(search.k))
    everything = vary(jnp.full_like(search.k, search.size))
    return Found(zeros.astype(dtype or search.keys[0].bits.dtype), everything, zeros)


def _reaching(search: Search) -> _Reaching:
    def counts(thresholds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _summed(
            key.counts(functools.partial(jnp.greater_equal, key.bits), [(t,) for t in thresholds])
            for key in search.keys
        )

    return counts


def _reaching_ties(search: Search, found: Found) -> _Reaching:
    """Of the entries at the threshold; the lower its index, the larger an entry."""

    def counts(firsts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values = [(found.threshold, first) for first in firsts]
        rows = zip(search.keys, _ranks(search), strict=True)
        return _summed(key.counts(tied(key.bits, rank), values) for key, rank in rows)

    def tied(bits: jax.Array, rank: jax.Array) -> Callable[..., jax.Array]:
        return lambda threshold, first: (bits == threshold) & (rank >= first)

    return counts


def _summed(by_array: Iterable[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    return tuple(functools.reduce(jnp.add, counts) for counts in zip(*by_array, strict=True))


def _ranks(search: Search) -> list[jax.Array]:
    """For each array of a search, how many entries of a part come after one, itself included."""
    left, ranks = search.size, []
    for key in search.keys:
        index = linear_index(key.bits.shape, key.inner, key.bits)
        ranks.append(jnp.array(left, INDEX) - index)
        left -= key.size
    return ranks


def _at_least(search: Search, found: Found, first: jax.Array) -> list[jax.Array]:
    """The entries above the threshold, and of those at it the ones of rank `first` or more."""

    def reached(bits: jax.Array, rank: jax.Array) -> Callable[..., jax.Array]:
        return lambda at, first: (bits > at) | ((bits == at) & (rank >= first))

    rows = zip(search.keys, _ranks(search), strict=True)
    return [key.entries(reached(key.bits, rank), found.threshold, first) for key, rank in rows]


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags)


def _whole(array: jax.Array) -> Keys:
    return Keys(array, tuple(range(array.ndim)), array.size)


def largest_bits(keys: Sequence[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest entries of several unsigned arrays together, by bisection.

    Args:
      keys: uint32 (or uint64) arrays of any shapes, at most 2**32 - 1 entries in all.
      k: how many, an integer scalar from 0 to the number of entries; may be traced.

    Returns:
      A bool array for each, with exactly k entries set in all; ties go to the first array and
      the lowest row-major index in it.
    """
    if sum(key.size for key in keys) == 0:
        return [jnp.zeros(key.shape, bool) for key in keys]
    return chosen([Search([_whole(key) for key in keys], jnp.asarray(k).astype(INDEX))])[0]


def largest_of_all(scores: Sequence[jax.Array], k: jax.Array | int) -> list[jax.Array]:
    """Masks of the k largest entries of several float arrays together (one global threshold).

    Args:
      scores: float arrays of any shapes; no NaN. Compared in float32 (float64 if any is).
      k: integer scalar from 0 to the number of all entries; may be traced.

    Returns:
      A bool array for each, with exactly k entries set in all; ties go to the first array and
      the lowest row-major index in it. On sharded arrays only counts travel.

    Example:
      >>> import jax.numpy as jnp
      >>> [m.tolist() for m in largest_of_all([jnp.array([1., 5.]), jnp.array([3., 4., 0.])], 3)]
      [[False, True], [True, True, False]]
    """
    wide = jnp.float64 if any(s.dtype == jnp.float64 for s in scores) else jnp.float32
    # Adding zero turns -0.0 into 0.0, which is what it is equal to.
    return largest_bits([ordered_bits(s.astype(wide) + 0) for s in scores], jnp.asarray(k))
