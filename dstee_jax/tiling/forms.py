"""Parameters in two forms: dense kernels, and rectangles of their active tiles."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.state import get_states
from dstee_jax.tiling.tiles import Tiles
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, mask_leaves, path_name


def tiles(opt_state: PyTree, params: PyTree) -> PyTree:
    """Which tiles are active, by leaf, of a state with `structures.tiles`.

    Args:
      opt_state: an optax state with one or more `SparseState`s in it; traced or not.
      params: the dense parameters, or their shapes (`jax.eval_shape`).

    Returns:
      The structure of `params`, with `Tiles` for each tiled leaf and None for every other.

    Raises:
      ValueError: the state has no tiles, or params are not the dense ones.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = dstee.transform(optax.adam(1e-2), structure=dstee.structures.tiles((16, 16)),
      ...                      packed=True, sparsity=0.5, total_steps=1000, key=jax.random.key(0))
      >>> opt_state = tx.init(params)
      >>> active = dstee.tiles(opt_state, params)
      >>> active["kernel"].index.shape, dstee.to_tiles(params, active)["kernel"].shape
      ((2, 2), (2, 32, 16))
    """
    states = [state for state in get_states(opt_state) if jax.tree.leaves(state.tile_sizes)]
    if not states:
        raise ValueError(
            "opt_state has no tiles: pass structure=dstee.structures.tiles((32, 32)) to "
            "dstee.transform."
        )
    leaves, treedef = jax.tree.flatten(params)
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    found: list[Any] = [None] * len(leaves)
    for state in states:
        rows = zip(
            mask_leaves(state.masks, params), mask_leaves(state.indices, params), strict=True
        )
        for i, (mask, index) in enumerate(rows):
            if not is_dense(index):
                found[i] = _tiles(names[i], index, mask.shape, jnp.shape(leaves[i]))
    return jax.tree.unflatten(treedef, found)


def _tiles(name: str, index: jax.Array, mask: tuple[int, ...], shape: tuple[int, ...]) -> Tiles:
    divides = len(mask) == len(shape) and not any(n % m for n, m in zip(shape, mask, strict=True))
    if not divides:
        raise ValueError(
            f"{name} has shape {shape}, and a mask of {mask} tiles: pass the dense parameters or "
            "their shapes, as dstee.to_dense(params, tiles)."
        )
    tile = (shape[-2] // mask[-2], shape[-1] // mask[-1])
    # A copy: who donates the state to a step can pass its tiles to the same call.
    return Tiles(jnp.array(index, copy=True), tile, shape[index.ndim - 2 :])


def no_tiles(tiles: PyTree) -> PyTree:
    """The same structure with None everywhere: for a step whose kernels are dense."""
    return jax.tree.map(lambda _: None, tiles, is_leaf=is_tiles)


def to_tiles(params: PyTree, tiles: PyTree) -> PyTree:
    """Dense kernels as rectangles of their active tiles; what is inactive is left out.

    Args:
      params: dense parameters, or another tree with their structure, as gradients.
      tiles: of `dstee.tiles`.

    Returns:
      `params` with an array of shape (..., columns of tiles, active * tile[0], tile[1]) for each
      tiled leaf, times a convolution's height and width; the others as they are.

    Raises:
      ValueError: a leaf is not the dense kernel of its tiles; names it, and both shapes.
    """
    return _each(params, tiles, "kernel_shape", lambda x, at: at.take(x))


def to_dense(params: PyTree, tiles: PyTree) -> PyTree:
    """Rectangles as dense kernels, zero where no tile is active; undoes `to_tiles`, bit for bit.

    Args:
      params: parameters in tiles, or another tree with their structure.
      tiles: as for `to_tiles`.

    Raises:
      ValueError: a leaf is not the rectangle of its tiles; names it, and both shapes.
    """
    return _each(params, tiles, "rectangle_shape", lambda x, at: at.dense(x))


def is_tiles(node: Any) -> bool:
    """Whether a node of a tree of tiles stands for a leaf of the parameters."""
    return node is None or isinstance(node, Tiles | optax.MaskedNode)


def _each(params: PyTree, tiles: PyTree, expected: str, convert: Any) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    nodes = [at for at in jax.tree.leaves(tiles, is_leaf=is_tiles)]
    if len(nodes) != len(leaves):
        raise ValueError(
            f"tiles have {len(nodes)} leaves and params {len(leaves)}: pass "
            "dstee.tiles(opt_state, params) of the same parameters."
        )

    def one(name: str, x: Any, at: Any) -> Any:
        if not isinstance(at, Tiles):
            return x
        if jnp.shape(x) != getattr(at, expected):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}, where its tiles of {at.tile} need "
                f"{getattr(at, expected)}: the dense kernel is {at.kernel_shape}, the rectangle "
                f"{at.rectangle_shape}."
            )
        return convert(x, at)

    return jax.tree.unflatten(treedef, list(map(one, names, leaves, nodes)))
