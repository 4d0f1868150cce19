"""Masks: which leaves are sparse, random masks of exact counts, and applying them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax import distributions
from dstee_jax.bisection import INDEX, Keys, chosen
from dstee_jax.counts import Count, Layout, Sparsity, Where, leaf_counts, total
from dstee_jax.distributions import Distribution
from dstee_jax.parts import Grid, inner_axes, join, sharding_of, split
from dstee_jax.state import (
    PyTree,
    check_key,
    find_states,
    is_dense,
    leaves_with_path,
    mask_leaves,
    path_name,
)
from dstee_jax.structures import Structure

_DENSE_NAMES = ("bias", "scale", "embedding")


def kernels(path: Any, leaf: Any) -> bool:
    """The default of `where`: kernels of dense, convolution and attention layers.

    True for arrays of 2 dimensions and more whose path has no part that contains 'bias',
    'scale' or 'embedding'.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: array or `jax.ShapeDtypeStruct`.
    """
    if getattr(leaf, "ndim", 0) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return not any(word in path_name(path).lower() for word in _DENSE_NAMES)


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
        return join(chosen([keys], jnp.asarray(count, INDEX))[0], shape, grid)

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
            masks.append(stacked_masks(structure, key_, shape, count, leaf.shape, axes))
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
    stacked = jnp.stack(masks).reshape(*counts.shape, *shape)
    return jnp.moveaxis(stacked, range(len(axes)), axes)


def lay(mask: Any, like: Any) -> jax.Array:
    """A copy of a mask that lies on devices as `like` does."""
    mask = jnp.array(mask)
    if isinstance(like, jax.core.Tracer):
        explicit = sharding_of(like)
        return mask if explicit is None else jax.sharding.reshard(mask, explicit)
    place = getattr(like, "sharding", None)
    spread = isinstance(place, jax.sharding.NamedSharding) and not isinstance(mask, jax.core.Tracer)
    return jax.device_put(mask, place) if spread else mask


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Raise a ValueError that names the leaf unless masks fit params."""
    paths = [(path, leaf) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    for (path, leaf), mask in zip(paths, mask_leaves(masks, params), strict=True):
        if is_dense(mask):
            continue
        if not hasattr(mask, "dtype") or mask.dtype != bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise ValueError(
                f"mask of {path_name(path)} has dtype {kind}: make it bool (m.astype(bool))."
            )
        if mask.shape != leaf.shape:
            raise ValueError(
                f"mask of {path_name(path)} has shape {mask.shape}, its parameter {leaf.shape}: "
                "they must be equal."
            )


def given_masks(masks: PyTree, *, fixed: bool) -> PyTree:
    """A copy of given masks in NumPy: later changes to the caller's arrays do not reach it.

    Traced masks are returned as they are if `fixed`: masks that never change need no counts.

    Raises:
      ValueError: a mask is traced and not `fixed`, or all leaves are dense.
    """
    leaves = jax.tree.leaves(masks)
    if not leaves:
        raise ValueError("masks= has no mask in it: give a bool array for at least one leaf.")
    if any(isinstance(mask, jax.core.Tracer) for mask in leaves):
        if fixed:
            return masks
        raise ValueError(
            "masks= is traced: the counts of active weights must be known when the step is "
            "compiled. Make the masks outside jit and vmap, or keep them fixed (every=None)."
        )
    return jax.tree.map(np.array, masks)


def check_structure(
    structure: Structure, path: Any, mask: Any, stack_axes: tuple[int, ...]
) -> None:
    """Raise a ValueError that names the leaf unless each layer of a given mask fits."""
    if is_dense(mask):
        return
    layer = [n for axis, n in enumerate(mask.shape) if axis not in stack_axes]
    layers = np.moveaxis(np.asarray(mask), stack_axes, range(len(stack_axes))).reshape(-1, *layer)
    if not all(map(structure.fits, layers)):
        raise ValueError(
            f"the mask given for {path_name(path)} does not have the structure: leave masks= "
            "out to start from a random one that has."
        )


def fitting_masks(masks: PyTree, params: PyTree) -> list[PyTree]:
    """The masks of an optimizer state (one tree a `SparseState`), or `masks` itself; checked."""
    trees = [state.masks for state in find_states(masks)] or [masks]
    for tree in trees:
        check_masks(tree, params)
    return trees


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set inactive weights to zero.

    Args:
      params: pytree of arrays.
      masks: masks with the structure of `params`, or an optimizer state that holds them (in
        any chain, also of an `nnx.Optimizer`).

    Returns:
      `params` with exact zeros where a mask is False; dense leaves as they were.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> mask = {"w": jnp.array([True, False]), "b": optax.MaskedNode()}
      >>> apply_masks({"w": jnp.array([1., 2.]), "b": jnp.array([3.])}, mask)["w"].tolist()
      [1.0, 0.0]
    """
    for tree in fitting_masks(masks, params):
        leaves, treedef = jax.tree.flatten(params)
        masked = [
            leaf if is_dense(mask) else jnp.where(mask, leaf, jnp.zeros_like(leaf))
            for leaf, mask in zip(leaves, mask_leaves(tree, params), strict=True)
        ]
        params = jax.tree.unflatten(treedef, masked)
    return params
