"""A choice between two arrays by their bits, for what an optimizer reads of whole leaves.

XLA's CPU compiler makes masked reads of a select, which some processors with AVX-512 seem not to
prefetch: an ordinary step of adamw then takes 1.3 times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.trees import expanded

WIDTHS = (8, 16, 32)  # not 4, of which arrays have bytes, nor 64: TPUs make two words of them


def either(mask: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """x where the mask is True, else other: `jnp.where` of two arrays of one shape and dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits not in WIDTHS:
        return jnp.where(expanded(mask, x.shape), x, other)
    return _either(expanded(mask, x.shape), x, other)


@jax.custom_jvp  # bits have no derivative
def _either(mask: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    ours, theirs = (lax.bitcast_convert_type(a, bits) for a in (x, other))
    return lax.bitcast_convert_type((ours ^ theirs) & -mask.astype(bits) ^ theirs, x.dtype)


@_either.defjvp
def _(primals: Any, tangents: Any) -> Any:
    mask, _, _ = primals
    _, of_x, of_other = tangents
    return _either(*primals), jnp.where(mask, of_x, of_other)
