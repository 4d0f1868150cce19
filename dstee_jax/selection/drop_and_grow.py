"""Drop-and-grow of one array: exact selection of what is dropped and what grows."""

import functools

import jax
import jax.numpy as jnp

from dstee_jax.selection.exchange import Exchange, exchange
from dstee_jax.selection.largest import Selection, check_selection


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
        `'auto'` takes `top_k` for `k_max` up to 256 in arrays of up to 4,096 entries that are
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
