"""The k largest entries of one array, by `lax.top_k` or by bisection.

Two ways, one result (ties go to the lowest row-major index in both):

* `lax.top_k` on the flattened array: plain, and quick where `k_max` is small.
* bisection: its cost does not depend on k, and on a sharded array only counts travel.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.bisection import INDEX, Keys, Search, chosen, ordered_bits
from dstee_jax.selection.parts import is_sharded

Selection = Literal["auto", "top_k", "bisection", "sharded"]
SELECTIONS = get_args(Selection)

# Measured on 2 CPU cores: up to here `top_k` is as fast as the bisection. Beyond it is not, and on
# a TPU it is a sort: 256 x 256 entries take 15 times as long to compile.
_TOP_K_MAX_SIZE = 4_096
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
    selection = resolve(selection, score, k_max)
    inner, k = tuple(range(score.ndim)), jnp.asarray(k).astype(INDEX)
    if selection == "top_k":
        return largest_top_k(score, inner, k, k_max)
    return chosen([search_of(score, inner, k, selection)])[0][0]


def resolve(selection: Selection, x: jax.Array, k_max: int) -> Selection:
    """`'auto'` by size and sharding."""
    if selection != "auto":
        return selection
    small = x.size <= _TOP_K_MAX_SIZE and k_max <= _TOP_K_MAX_K
    return "top_k" if small and not is_sharded(x) else "bisection"


def search_of(
    score: jax.Array,
    inner: tuple[int, ...],
    k: jax.Array,
    selection: Selection,
    side: jax.Array | None = None,
) -> Search:
    """For the k largest entries of each part of an array (as `parts.split` cuts it)."""
    keys = Keys(ordered_bits(score), inner, size_of(score, inner), selection == "sharded", side)
    return Search([keys], k)


def size_of(x: jax.Array, axes: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, (x.shape[axis] for axis in axes), 1)


def largest_top_k(score: jax.Array, inner: tuple[int, ...], k: jax.Array, k_max: int) -> jax.Array:
    outer = [axis for axis in range(score.ndim) if axis not in inner]
    moved = score.transpose(*outer, *inner)
    flat = moved.reshape(*moved.shape[: len(outer)], size_of(score, inner))
    _, index = lax.top_k(flat, k_max)
    wanted = lax.broadcasted_iota(INDEX, index.shape, index.ndim - 1) < k[..., None]
    found = jnp.put_along_axis(
        jnp.zeros(flat.shape, bool), index, wanted, axis=-1, inplace=False, mode="promise_in_bounds"
    )
    back = sorted(range(score.ndim), key=[*outer, *inner].__getitem__)
    return found.reshape(moved.shape).transpose(back)
