"""Exact selection of the k largest entries, bit by bit, with counting passes.

The cost does not depend on k, k may be traced, and on sharded arrays only counts travel.
Several arrays may be searched as one, one array part by part, and many searches in one loop.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.parts import by_part, sharding_of

INDEX = jnp.uint32  # of counts and indices: up to 2**32 - 1 entries of a part


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

    One variadic reduce, which XLA vectorises on CPU where it does not a plain sum of bools:
    give it two arrays at least. Between devices it would be an all-gather of every device's
    counts; so axes that are split are summed by themselves, which is an all-reduce. Explicit
    mesh axes are seen in the type; for Auto ones `sharded` says it, and all sums are plain.
    """
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
    """One array of unsigned keys, cut into parts."""

    bits: jax.Array  # `parts.split` of the array
    inner: tuple[int, ...]  # its axes within a part
    size: int  # entries of a part
    sharded: bool = False  # whether it is split over Auto mesh axes

    def spread(self, per_part: jax.Array) -> jax.Array:
        """A value for each part, to broadcast against the bits."""
        return jnp.expand_dims(per_part, self.inner) if per_part.ndim else per_part

    def reaching(self, *thresholds: jax.Array) -> tuple[jax.Array, ...]:
        """How many keys of each part reach each threshold."""
        reached = (self.bits >= self.spread(t) for t in thresholds)
        return count(self.inner, *reached, sharded=self.sharded)


class Search(NamedTuple):
    """The k largest of some keys, in each part for itself."""

    keys: Sequence[Keys]  # cut into the same parts, and searched as one array
    k: jax.Array  # INDEX, with an axis for each axis that counts parts; at most the entries

    @property
    def size(self) -> int:
        """Entries of a part, of all keys together."""
        return sum(key.size for key in self.keys)


class Found(NamedTuple):
    """For each part of a search: a threshold that at least k entries reach, and no smaller set."""

    threshold: jax.Array  # of the keys' dtype
    reached: jax.Array  # INDEX: how many entries are at least the threshold
    above: jax.Array  # INDEX: how many are above it; exact unless reached == k


def _kth_largest(searches: Sequence[Search], bits: int) -> list[Found]:
    """Find the k-th largest key of each search, of all searches in one loop.

    Fixes two bits a pass, from the top, and stops early once exactly k entries are reached
    everywhere. On devices the counts of all searches travel together.

    Returns:
      For each search: `reached == k`, or `reached > k` and `threshold` is the k-th largest value,
      whose ties are still to be broken.
    """

    def unfinished(carry: tuple[jax.Array, list[Found]]) -> jax.Array:
        shift, found = carry
        rows = zip(found, searches, strict=True)
        return (shift >= 0) & _any([jnp.any(f.reached != s.k) for f, s in rows])

    def two_bits(carry: tuple[jax.Array, list[Found]]) -> tuple[jax.Array, list[Found]]:
        shift, found = carry
        return shift - 2, [_narrow(s, f, shift) for s, f in zip(searches, found, strict=True)]

    def start(search: Search) -> Found:
        zeros = jnp.zeros_like(search.k)
        everything = jnp.full_like(search.k, search.size)
        return Found(zeros.astype(search.keys[0].bits.dtype), everything, zeros)

    top = jnp.int32(bits + bits % 2 - 2)
    # The first pass outside the loop: under shard_map it gives the carry the key's own type.
    carry = two_bits((top, list(map(start, searches))))
    return lax.while_loop(unfinished, two_bits, carry)[1]


def _narrow(search: Search, found: Found, shift: jax.Array) -> Found:
    """A threshold with two more bits, at `shift`."""
    threshold, reached, above = found
    dtype = threshold.dtype
    step = jnp.left_shift(jnp.array(1, dtype), shift.astype(dtype))
    tries = tuple(threshold + step * jnp.array(j, dtype) for j in (1, 2, 3))
    by_array = [key.reaching(*tries) for key in search.keys]
    counts = [functools.reduce(jnp.add, c) for c in zip(*by_array, strict=True)]
    for candidate, n in zip(tries, counts, strict=True):
        threshold = jnp.where(n >= search.k, candidate, threshold)
        reached = jnp.where(n >= search.k, n, reached)
    for n in reversed(counts):
        above = jnp.where(n < search.k, n, above)
    return Found(threshold, reached, above)


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags)


def chosen(searches: Sequence[Search]) -> list[list[jax.Array]]:
    """Masks of the k largest entries of each search (in each part of it), in one loop for all.

    Args:
      searches: of keys of one dtype.

    Returns:
      For each search a bool array for each of its keys, shaped as its bits. Ties go to the first
      array and the lowest row-major index of the part.
    """
    if not searches:
        return []
    searches = [s._replace(k=by_part(s.k, s.keys[0].bits, s.keys[0].inner)) for s in searches]
    found = _kth_largest(searches, 8 * searches[0].keys[0].bits.dtype.itemsize)
    ready = ~_any([jnp.any(f.reached != s.k) for f, s in zip(found, searches, strict=True)])

    def at_least() -> list[list[jax.Array]]:
        return [
            [key.bits >= key.spread(f.threshold) for key in s.keys]
            for s, f in zip(searches, found, strict=True)
        ]

    def break_ties() -> list[list[jax.Array]]:
        ranks = [_ranks(s, f) for s, f in zip(searches, found, strict=True)]
        last = _kth_largest(ranks, max(s.size for s in searches).bit_length())
        return [_with_ties(*row) for row in zip(searches, found, ranks, last, strict=True)]

    return lax.cond(ready, at_least, break_ties)


def _ranks(search: Search, found: Found) -> Search:
    """What to search for the ties to keep: reversed indices, 0 for entries that are not tied."""
    left = search.size
    ranks = []
    for key in search.keys:
        reverse = jnp.array(left, INDEX) - linear_index(key.bits.shape, key.inner, key.bits)
        tied = key.bits == key.spread(found.threshold)
        ranks.append(key._replace(bits=jnp.where(tied, reverse, jnp.zeros((), INDEX))))
        left -= key.size
    # A part without ties has its k already (then `above` may not be exact): all its entries.
    everything = jnp.full_like(search.k, search.size)
    return Search(ranks, jnp.where(found.reached == search.k, everything, search.k - found.above))


def _with_ties(search: Search, found: Found, ranks: Search, last: Found) -> list[jax.Array]:
    """The entries above the threshold, and of those at it the ones of lowest index."""
    return [
        jnp.where(
            key.spread(found.reached == search.k),
            key.bits >= key.spread(found.threshold),
            (key.bits > key.spread(found.threshold)) | (rank.bits >= rank.spread(last.threshold)),
        )
        for key, rank in zip(search.keys, ranks.keys, strict=True)
    ]


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
