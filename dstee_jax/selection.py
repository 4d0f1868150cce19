"""Exact selection of the k best entries of one array, and drop-and-grow on top of it.

Two ways, one result (ties go to the lowest row-major index in both):

* `lax.top_k` on the flattened array: plain, and quick where `k_max` is small.
* radix bisection: finds the k-th largest entry bit by bit with counting passes. Its cost
  does not depend on k, k may be traced, and on a sharded array only counts travel.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Selection = Literal["auto", "top_k", "bisection"]

# Measured on 2 CPU cores (benchmarks/mask_update.py): up to here `top_k` beats the bisection.
_TOP_K_MAX_SIZE = 65_536
_TOP_K_MAX_K = 256


def _ordered_bits(score: jax.Array) -> jax.Array:
    """Map floats to unsigned integers of the same order (float32 -> uint32)."""
    unsigned = jnp.uint64 if score.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(score, unsigned)
    sign = jnp.array(1 << (8 * bits.dtype.itemsize - 1), unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _linear_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every entry, uint32, built without a reshape (which would gather)."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def _count(*predicates: jax.Array) -> tuple[jax.Array, ...]:
    """How many entries of each bool array are True, uint32: one pass over all of them.

    One variadic reduce, which XLA vectorises on CPU where it does not a plain sum of bools:
    give it two arrays at least.
    """
    ones = tuple(p.astype(jnp.uint32) for p in predicates)
    zeros = (jnp.uint32(0),) * len(ones)

    def add(x: tuple, y: tuple) -> tuple:
        return tuple(a + b for a, b in zip(x, y, strict=True))

    return tuple(lax.reduce(ones, zeros, add, tuple(range(ones[0].ndim))))


def _kth_largest(keys: Sequence[jax.Array], k: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Find a threshold that at least k entries of unsigned arrays reach, and no smaller set.

    Fixes two bits a pass, from the top, and stops early once exactly k entries are reached.

    Returns:
      `(threshold, reached, above)`: how many entries are at least, and (exact unless
      `reached == k`) how many above the threshold. `reached == k`, or `reached > k` and
      `threshold` is the k-th largest value, whose ties are still to be broken.
    """
    dtype = keys[0].dtype

    def unfinished(carry):
        _, shift, reached, _ = carry
        return (shift >= 0) & (reached != k)

    def two_bits(carry):
        threshold, shift, reached, above = carry
        step = jnp.left_shift(jnp.array(1, dtype), shift.astype(dtype))
        tries = tuple(threshold + step * jnp.array(j, dtype) for j in (1, 2, 3))
        by_array = [_count(*(key >= t for t in tries)) for key in keys]
        counts = [functools.reduce(jnp.add, c) for c in zip(*by_array, strict=True)]
        for candidate, count in zip(tries, counts, strict=True):
            threshold = jnp.where(count >= k, candidate, threshold)
            reached = jnp.where(count >= k, count, reached)
        for count in reversed(counts):
            above = jnp.where(count < k, count, above)
        return threshold, shift - 2, reached, above

    top = jnp.int32(bits + bits % 2 - 2)
    total = jnp.uint32(sum(key.size for key in keys))
    start = (jnp.array(0, dtype), top, total, jnp.uint32(0))
    # The first pass outside the loop: under shard_map it gives the carry the key's own type.
    threshold, _, reached, above = lax.while_loop(unfinished, two_bits, two_bits(start))
    return threshold, reached, above


def largest_bits(keys: Sequence[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest entries of several unsigned arrays together, by bisection.

    Args:
      keys: uint32 (or uint64) arrays of any shapes, at most 2**32 - 1 entries in all.
      k: how many, an integer scalar from 0 to the number of entries; may be traced.

    Returns:
      A bool array for each, with exactly k entries set in all; ties go to the first array and
      the lowest row-major index in it.
    """
    keys = list(keys)
    total = sum(key.size for key in keys)
    if total == 0:
        return [jnp.zeros(key.shape, bool) for key in keys]
    k = jnp.asarray(k).astype(jnp.uint32)
    threshold, reached, above = _kth_largest(keys, k, 8 * keys[0].dtype.itemsize)

    def break_ties() -> list[jax.Array]:
        # The lowest index wins: bisect the reversed index, 0 for entries not tied.
        ranks, offset = [], 0
        for key in keys:
            reverse = jnp.uint32(total - offset) - _linear_index(key.shape)
            ranks.append(jnp.where(key == threshold, reverse, jnp.uint32(0)))
            offset += key.size
        last, _, _ = _kth_largest(ranks, k - above, total.bit_length())
        return [(key > threshold) | (rank >= last) for key, rank in zip(keys, ranks, strict=True)]

    return lax.cond(reached == k, lambda: [key >= threshold for key in keys], break_ties)


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
    return largest_bits([_ordered_bits(s.astype(wide) + 0) for s in scores], jnp.asarray(k))


def _largest_top_k(score: jax.Array, k: jax.Array, k_max: int) -> jax.Array:
    _, index = lax.top_k(score.reshape(-1), k_max)
    chosen = jnp.arange(k_max, dtype=jnp.uint32) < jnp.asarray(k).astype(jnp.uint32)
    return jnp.zeros(score.size, bool).at[index].set(chosen).reshape(score.shape)


def _is_sharded(x: jax.Array) -> bool:
    """Whether the type of x says that it is split over Explicit mesh axes."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def largest(score: jax.Array, k: jax.Array, k_max: int, selection: Selection = "auto") -> jax.Array:
    """Mask of the k largest entries of a float array.

    Args:
      score: float array of any shape. Entries of minus infinity must not be wanted: k is at
        most the number of the others. No NaN.
      k: integer scalar in [0, k_max]; may be traced.
      k_max: static bound on k.
      selection: `'top_k'`, `'bisection'`, or `'auto'` (by size and sharding).

    Returns:
      A bool array of `score.shape` with exactly k entries set; ties go to the lowest index.
    """
    if selection not in ("auto", "top_k", "bisection"):
        raise ValueError(f"selection={selection!r} is unknown: use 'auto', 'top_k' or 'bisection'.")
    if k_max == 0 or score.size == 0:
        return jnp.zeros(score.shape, bool)
    if selection == "auto":
        small = score.size <= _TOP_K_MAX_SIZE and k_max <= _TOP_K_MAX_K
        selection = "top_k" if small and not _is_sharded(score) else "bisection"
    if selection == "top_k":
        return _largest_top_k(score, k, k_max)
    return largest_bits([_ordered_bits(score)], k)[0]


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
      selection: `'auto'`, `'top_k'` or `'bisection'`: same result, different cost. `'auto'`
        takes `top_k` for `k_max` up to 256 in arrays of up to 65,536 entries that are not
        split over Explicit mesh axes, and the bisection elsewhere.

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
    if mask.dtype != bool:
        raise ValueError(f"mask has dtype {mask.dtype}: pass a bool array (mask.astype(bool)).")
    if not mask.shape == jnp.shape(drop_score) == jnp.shape(grow_score):
        raise ValueError(
            f"mask, drop_score and grow_score have shapes {mask.shape}, {jnp.shape(drop_score)} "
            f"and {jnp.shape(grow_score)}: pass three arrays of one shape."
        )
    if k_max < 0:
        raise ValueError(f"k_max={k_max} is negative: pass a bound of 0 or more.")
    k_max = min(k_max, mask.size)
    if k_max == 0:
        return mask
    double = any(jnp.result_type(x) == jnp.float64 for x in (drop_score, grow_score))
    wide = jnp.float64 if double else jnp.float32
    drop_score, grow_score = (jnp.asarray(x).astype(wide) for x in (drop_score, grow_score))

    active, free = _count(mask, ~mask & jnp.isfinite(grow_score))

    def clip(k: jax.Array | int, bound: jax.Array) -> jax.Array:
        return jnp.clip(jnp.asarray(k), 0, k_max).astype(jnp.uint32).clip(max=bound)

    k = clip(k, active)
    if k_grow is not None:
        k_grow = clip(k_grow, free + k if regrow else free)
    else:
        k_grow = k = k if regrow else k.clip(max=free)

    largest_float = jnp.finfo(wide).max

    def exchange(phase: jax.Array, now: jax.Array) -> jax.Array:
        """Phase 0 turns the worst active entries off, phase 1 the best inactive ones on."""
        dropping = phase == 0
        raw = jnp.where(dropping, drop_score, grow_score)
        raw = jnp.where(dropping, -raw, raw)
        # NaN is dropped last and never grown. A dropped entry without a finite grow score comes
        # back only if nothing else is left, which is the same as not having dropped it.
        score = jnp.where(jnp.isfinite(raw), raw, -largest_float)
        score = jnp.where(dropping & (raw == jnp.inf), largest_float, score)
        eligible = jnp.where(dropping, mask, ~mask & jnp.isfinite(raw))
        if regrow:
            eligible |= mask & ~now
        # Subnormal numbers and -0.0 become 0.0, as CPU arithmetic sees them.
        score = jnp.where(jnp.abs(score) < jnp.finfo(wide).tiny, jnp.zeros((), wide), score)
        score = jnp.where(eligible, score, -jnp.inf)
        return now ^ largest(score, jnp.where(dropping, k, k_grow), k_max, selection)

    # A loop, not two calls: half the code to compile, and both phases use the same memory.
    return lax.fori_loop(0, 2, exchange, mask)
