"""Masks that somebody gives: whether they fit, and how they are applied."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.rules.structures import Structure
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import get_states
from dstee_jax.trees import (
    PyTree,
    expanded,
    is_dense,
    leaves_with_path,
    mask_leaves,
    path_name,
)


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


def lay(mask: Any, like: Any) -> jax.Array:
    """A copy of a mask that lies on devices as `like` does."""
    mask = jnp.array(mask)
    if isinstance(like, jax.core.Tracer):
        explicit = sharding_of(like)
        return mask if explicit is None else jax.sharding.reshard(mask, explicit)
    place = getattr(like, "sharding", None)
    spread = isinstance(place, jax.sharding.NamedSharding) and not isinstance(mask, jax.core.Tracer)
    return jax.device_put(mask, place) if spread else mask


def fitting_masks(masks: PyTree, params: PyTree) -> list[PyTree]:
    """The masks of an optimizer state (one tree a `SparseState`), or `masks` itself; checked."""
    trees = [state.masks for state in get_states(masks)]
    if not trees:
        check_masks(masks, params)
        return [masks]
    full = [of_weights(tree, params) for tree in trees]
    for tree in full:
        check_masks(tree, params)
    return full


def by_leaf(masks: PyTree, params: PyTree) -> list[Any]:
    """The mask of each leaf of `params`, `MaskedNode` where there is none.

    Of a tree of masks, or of an optimizer state, which may hold several; as they are kept there,
    of weights or of tiles, and not checked.
    """
    trees = [state.masks for state in get_states(masks)] or [masks]
    columns = [mask_leaves(tree, params) for tree in trees]
    found = zip(*columns, strict=True)
    return [next((m for m in own if not is_dense(m)), optax.MaskedNode()) for own in found]


def of_weights(masks: PyTree, params: PyTree) -> PyTree:
    """Masks of weights, as the parameters are, from those of a state, which may be of tiles."""
    pairs = zip(mask_leaves(masks, params), jax.tree.leaves(params), strict=True)

    def one(mask: Any, leaf: Any) -> Any:
        parts = jnp.shape(mask)
        of_tiles = len(parts) == jnp.ndim(leaf) and all(
            size and n % size == 0 for n, size in zip(leaf.shape, parts, strict=True)
        )
        return expanded(mask, leaf.shape) if of_tiles else mask

    full = [m if is_dense(m) else one(m, x) for m, x in pairs]
    return jax.tree.unflatten(jax.tree.structure(params), full)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set inactive weights to zero.

    Args:
      params: pytree of arrays.
      masks: masks with the structure of `params`, or an optimizer state that holds them (in
        any chain, also of an `nnx.Optimizer`).

    Returns:
      `params` with exact zeros where a mask is False; dense leaves as they were.

    Raises:
      ValueError: masks and parameters do not have the same structure.

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
