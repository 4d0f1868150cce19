"""Random masks of exact counts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.masks import distributions
from dstee_jax.masks.counts import Count, Layout, Sparsity, Where, leaf_counts, total
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.given import lay
from dstee_jax.masks.where import kernels
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.bisection import INDEX, Keys, Search, chosen
from dstee_jax.selection.parts import Grid, inner_axes, join, sharding_of, split
from dstee_jax.state import check_key
from dstee_jax.trees import PyTree


def random_mask(
    key: jax.Array, shape: tuple[int, ...], count: Count, grid: Grid | None = None, like: Any = None
) -> jax.Array:
    """Random bool array with exactly `count` entries set in each part of `grid`.

    Lies on devices as `like` does, if that is an array over several.
    """
    grid = (1,) * len(shape) if grid is None else grid

    def draw() -> jax.Array:
        explicit = None if like is None else sharding_of(like)
        if total(count) >= math.prod(shape):
            return jnp.ones(shape, bool, out_sharding=explicit)
        bits = split(jax.random.bits(key, shape, jnp.uint32, out_sharding=explicit), grid)
        inner = inner_axes(shape, grid)
        keys = Keys(bits, inner, math.prod(shape) // max(math.prod(grid), 1))
        return join(chosen([Search([keys], jnp.asarray(count, INDEX))])[0][0], shape, grid)

    place = None if isinstance(like, jax.core.Tracer) else getattr(like, "sharding", None)
    if isinstance(place, jax.sharding.NamedSharding) and not isinstance(key, jax.core.Tracer):
        return jax.jit(draw, out_shardings=place)()
    return draw()


def init_masks(
    params: PyTree,
    sparsity: Sparsity,
    key: jax.Array,
    *,
    distribution: Distribution = distributions.erk,
    where: Where = kernels,
) -> PyTree:
    """Random masks of exact counts for the leaves that `where` selects.

    Args:
      params: pytree of arrays (or inside `jax.eval_shape`).
      sparsity: in [0, 1), or a dict from path ('Dense_0/kernel') to sparsity.
      key: PRNG key.
      distribution: how the sparsity is shared among the leaves.
      where: `(path, leaf) -> bool`, which leaves are sparse.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: `where` selects no leaf, or a leaf would keep no weight.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((10, 10)), "bias": jnp.ones(10)}
      >>> masks = init_masks(params, 0.9, jax.random.key(0))
      >>> int(masks["kernel"].sum()), masks["bias"]
      (10, MaskedNode())
    """
    check_key(key)
    return masks_of_counts(params, leaf_counts(params, sparsity, distribution, where), key)


def masks_of_counts(
    params: PyTree,
    counts: list[Count | None],
    key: jax.Array,
    structure: Structure | None = None,
    layout: Layout | None = None,
) -> PyTree:
    """Random masks with the given count in each leaf (or part), `MaskedNode` where it is None."""
    layout = layout or Layout(params, None, None)
    leaves, treedef = jax.tree.flatten(params)
    masks = []
    for i, (leaf, count) in enumerate(zip(leaves, counts, strict=True)):
        key_ = jax.random.fold_in(key, i)
        if count is None:
            masks.append(optax.MaskedNode())
        elif structure is None:
            masks.append(random_mask(key_, leaf.shape, count, layout.grid(i), leaf))
        else:
            shape, axes = layout.unstacked(i).shape, layout.stacks[i]
            mask = stacked_masks(structure, key_, shape, count, leaf.shape, axes)
            masks.append(mask if structure.tile else lay(mask, leaf))
    return jax.tree.unflatten(treedef, masks)


def stacked_masks(
    structure: Structure,
    key: jax.Array,
    shape: tuple[int, ...],
    count: Count,
    whole: tuple[int, ...],
    axes: tuple[int, ...],
) -> jax.Array:
    """Random masks of a structure for all layers of a leaf."""
    if not axes:
        return structure.random_mask(key, shape, int(count))
    counts = np.broadcast_to(count, [whole[axis] for axis in axes])
    keys = jax.random.split(key, counts.size)
    masks = [
        structure.random_mask(k, shape, int(n)) for k, n in zip(keys, counts.flat, strict=True)
    ]
    stacked = jnp.stack(masks).reshape(*counts.shape, *masks[0].shape)
    return jnp.moveaxis(stacked, range(len(axes)), axes)
