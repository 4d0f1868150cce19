"""Exact selection of the k largest entries, bit by bit, with counting passes.

The cost does not depend on k, k may be traced, and on sharded arrays only counts travel.
Several arrays may be searched as one, and one array part by part.
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


def _kth_largest(
    keys: Sequence[Keys], k: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find, for each part, a threshold that at least k entries reach, and no smaller set.

    Fixes two bits a pass, from the top, and stops early once exactly k entries are reached.

    Returns:
      `(threshold, reached, above)`: how many entries are at least, and (exact unless
      `reached == k`) how many above the threshold. `reached == k`, or `reached > k` and
      `threshold` is the k-th largest value, whose ties are still to be broken.
    """
    dtype = keys[0].bits.dtype

    def unfinished(carry):
        _, shift, reached, _ = carry
        return (shift >= 0) & jnp.any(reached != k)

    def two_bits(carry):
        threshold, shift, reached, above = carry
        step = jnp.left_shift(jnp.array(1, dtype), shift.astype(dtype))
        tries = tuple(threshold + step * jnp.array(j, dtype) for j in (1, 2, 3))
        by_array = [
            count(key.inner, *(key.bits >= key.spread(t) for t in tries), sharded=key.sharded)
            for key in keys
        ]
        counts = [functools.reduce(jnp.add, c) for c in zip(*by_array, strict=True)]
        for candidate, n in zip(tries, counts, strict=True):
            threshold = jnp.where(n >= k, candidate, threshold)
            reached = jnp.where(n >= k, n, reached)
        for n in reversed(counts):
            above = jnp.where(n < k, n, above)
        return threshold, shift - 2, reached, above

    top = jnp.int32(bits + bits % 2 - 2)
    total = jnp.full_like(k, sum(key.size for key in keys))
    start = (jnp.zeros_like(k, dtype), top, total, jnp.zeros_like(k))
    # The first pass outside the loop: under shard_map it gives the carry the key's own type.
    threshold, _, reached, above = lax.while_loop(unfinished, two_bits, two_bits(start))
    return threshold, reached, above


def chosen(keys: Sequence[Keys], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest entries of all keys together (in each part).

    Args:
      keys: arrays cut into the same parts.
      k: INDEX, with an axis for each axis that counts parts; at most the entries of a part.

    Returns:
      A bool array for each, shaped as its bits. Ties go to the first array and the lowest
      row-major index of the part.
    """
    k = by_part(k, keys[0].bits, keys[0].inner)
    threshold, reached, above = _kth_largest(keys, k, 8 * keys[0].bits.dtype.itemsize)

    def at_least() -> list[jax.Array]:
        return [key.bits >= key.spread(threshold) for key in keys]

    def break_ties() -> list[jax.Array]:
        # The lowest index wins: bisect the reversed index, 0 for entries not tied.
        total = left = sum(key.size for key in keys)
        ranks = []
        for key in keys:
            reverse = jnp.array(left, INDEX) - linear_index(key.bits.shape, key.inner, key.bits)
            tied = key.bits == key.spread(threshold)
            ranks.append(key._replace(bits=jnp.where(tied, reverse, jnp.zeros((), INDEX))))
            left -= key.size
        # A part without ties has its k already (then `above` may not be exact): all its entries.
        wanted = jnp.where(reached == k, jnp.full_like(k, total), k - above)
        last, _, _ = _kth_largest(ranks, wanted, total.bit_length())
        rows = zip(keys, ranks, strict=True)
        return [
            jnp.where(
                key.spread(reached == k),
                key.bits >= key.spread(threshold),
                (key.bits > key.spread(threshold)) | (rank.bits >= rank.spread(last)),
            )
            for key, rank in rows
        ]

    return lax.cond(jnp.all(reached == k), at_least, break_ties)


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
    return chosen([_whole(key) for key in keys], jnp.asarray(k).astype(INDEX))


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
