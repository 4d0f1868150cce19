"""Rows, one axis of up to 2**32 - 1 entries, with uint32 indices; jax.numpy's are int32.

Where a mask's ones are is found from bits: 32 entries in a word, so that running counts are kept
for words and not for entries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.bisection import INDEX

BITS = 32
ALONG = lax.ScatterDimensionNumbers((), (0,), scatter_dims_to_operand_dims=(0,))


def take(row: jax.Array, where: jax.Array) -> jax.Array:
    """row[where]; `where` is sorted and unique."""
    return _gather(
        row,
        where,
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def take_any(row: jax.Array, where: jax.Array) -> jax.Array:
    """row[where], in any order; the last entry beyond the end."""
    return _gather(row, where, mode=lax.GatherScatterMode.CLIP)


def put(row: jax.Array, where: jax.Array, values: jax.Array) -> jax.Array:
    """row.at[where].set(values); `where` is sorted and unique."""
    return lax.scatter(
        row,
        where[:, None],
        values,
        ALONG,
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def positions(mask: jax.Array, count: int) -> jax.Array:
    """Where a mask with `count` True is True: INDEX, shape (count,)."""
    words = _words(mask)
    before = _before(words)
    # The word of the i-th one: the last word that starts at or before i.
    first = lax.scatter_max(
        jnp.zeros(count, INDEX),
        before[:, None],
        jnp.arange(words.size, dtype=INDEX),
        ALONG,
        indices_are_sorted=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
    word = lax.cummax(first)
    rank = jnp.arange(count, dtype=INDEX) - take_any(before, word)
    return word * jnp.array(BITS, INDEX) + _nth_one(take_any(words, word), rank)


def rank(mask: jax.Array, where: jax.Array) -> jax.Array:
    """How many True are before each of the positions: INDEX, the shape of `where`."""
    words = _words(mask)
    word, bit = where // jnp.array(BITS, INDEX), where % jnp.array(BITS, INDEX)
    below = (jnp.ones((), jnp.uint32) << bit.astype(jnp.uint32)) - jnp.ones((), jnp.uint32)
    ones = lax.population_count(take_any(words, word) & below)
    return take_any(_before(words), word) + ones.astype(INDEX)


def _words(mask: jax.Array) -> jax.Array:
    """The entries of a bool row as bits, the first one lowest: uint32, the last one padded."""
    bits = jnp.pad(mask, (0, -mask.size % BITS)).reshape(-1, BITS).astype(jnp.uint32)
    place = lax.broadcasted_iota(jnp.uint32, bits.shape, 1)
    return jnp.sum(bits << place, axis=-1, dtype=jnp.uint32)


def _before(words: jax.Array) -> jax.Array:
    """How many ones are in the words before each."""
    ones = lax.population_count(words).astype(INDEX)
    return jnp.cumsum(ones, dtype=INDEX) - ones


def _nth_one(word: jax.Array, n: jax.Array) -> jax.Array:
    """Where in a word its n-th one is, from 0: INDEX. Halves the word five times."""
    found = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        below = jnp.array((1 << half) - 1, jnp.uint32)
        ones = lax.population_count(word & below).astype(INDEX)
        above = n >= ones
        n -= jnp.where(above, ones, jnp.zeros((), INDEX))
        found += jnp.where(above, jnp.array(half, INDEX), jnp.zeros((), INDEX))
        word >>= jnp.where(above, jnp.array(half, jnp.uint32), jnp.zeros((), jnp.uint32))
    return found


def _gather(row: jax.Array, where: jax.Array, **known: Any) -> jax.Array:
    numbers = lax.GatherDimensionNumbers((), collapsed_slice_dims=(0,), start_index_map=(0,))
    return lax.gather(row, where[:, None], numbers, slice_sizes=(1,), **known)
