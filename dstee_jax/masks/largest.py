"""Masks of the largest entries of each leaf, as many as a distribution says."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.masks.counts import Layout, Sparsity, StackAxes, Where, leaf_counts
from dstee_jax.masks.distributions import Distribution
from dstee_jax.selection.bisection import INDEX, Keys, Search, chosen, ordered_bits
from dstee_jax.selection.parts import inner_axes, join, split
from dstee_jax.trees import PyTree


def largest_masks(
    scores: PyTree,
    sparsity: Sparsity,
    share: jax.Array | float = 1.0,
    *,
    distribution: Distribution,
    where: Where,
    stack_axes: StackAxes | None = None,
) -> PyTree:
    """Masks of the largest entries of each leaf, in one search for all leaves.

    Of a leaf of n entries that keeps k at `sparsity`, k + round((1 - share) (n - k)) stay: all at
    share 0, k at 1.

    Args:
      scores: pytree of arrays, 0 or more, no NaN.
      sparsity: in [0, 1), or a dict from path to sparsity.
      share: of the way from dense to `sparsity`, in [0, 1]; may be traced.
      distribution, where, stack_axes: as for `dstee.transform`.

    Returns:
      The structure of `scores`: bool arrays, `optax.MaskedNode()` where dense. Ties go to the
      lowest index.

    Raises:
      ValueError: `where` selects no leaf, or a leaf would keep no weight.
    """
    layout = Layout(scores, stack_axes, None)
    counts = leaf_counts(scores, sparsity, distribution, where, None, layout)
    leaves, treedef = jax.tree.flatten(scores)
    sparse = [i for i, count in enumerate(counts) if count is not None]
    wide = jnp.float64 if any(leaves[i].dtype == jnp.float64 for i in sparse) else jnp.float32
    left = 1 - jnp.clip(jnp.asarray(share, jnp.float32), 0, 1)

    def search(i: int) -> Search:
        x, grid = leaves[i], layout.grid(i)
        size = x.size // math.prod(grid)
        target = jnp.asarray(counts[i], INDEX)
        more = jnp.round(left * (size - target).astype(jnp.float32)).astype(INDEX)
        k = jnp.minimum(target + more, jnp.array(size, INDEX))
        bits = ordered_bits(split(x.astype(wide), grid))
        return Search([Keys(bits, inner_axes(x.shape, grid), size)], k)

    nodes: list[Any] = [optax.MaskedNode()] * len(leaves)
    for i, (mask,) in zip(sparse, chosen([search(i) for i in sparse]), strict=True):
        nodes[i] = join(mask, leaves[i].shape, layout.grid(i))
    return jax.tree.unflatten(treedef, nodes)
