"""Parameters in two forms: dense kernels, and rectangles of their active tiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.state import SparseState, get_states
from dstee_jax.tiling.tiles import Tiles, with_candidates
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, mask_leaves, path_name

CANDIDATES = 4  # folded into the key for their draw; scores have 0 to 3


def tiles(opt_state: PyTree, params: PyTree, *, candidates: float = 0.0) -> PyTree:
    """Which tiles are active, by leaf, of a state with `structures.tiles`.

    With `candidates`, some inactive tiles beside them, drawn at random from the state's key and
    step count: for a mask step that makes no dense gradient. In rectangles of these tiles
    (`dstee.to_tiles`) candidates are zero, products leave them out and autodiff gives their
    gradients all the same, and `dstee.apply(..., tiles=)` grows among them alone.

    Args:
      opt_state: an optax state with one or more `SparseState`s in it; traced or not.
      params: the dense parameters, or their shapes (`jax.eval_shape`).
      candidates: for each active tile of a column, rounded up to whole tiles; at most all that
        are inactive. 1.0 doubles the rectangles; less than the drop fraction limits the growth.

    Returns:
      The structure of `params`, with `Tiles` for each tiled leaf and None for every other.

    Raises:
      ValueError: the state has no tiles, params are not the dense ones, or candidates is negative.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = dstee.transform(optax.adam(1e-2), structure=dstee.structures.tiles((16, 16)),
      ...                      packed=True, sparsity=0.5, total_steps=1000, key=jax.random.key(0))
      >>> opt_state = tx.init(params)
      >>> active = dstee.tiles(opt_state, params)
      >>> active["kernel"].index.shape, dstee.to_tiles(params, active)["kernel"].shape
      ((2, 2), (2, 32, 16))
      >>> dstee.tiles(opt_state, params, candidates=0.5)["kernel"].index.shape
      (2, 3)

    References:
      Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic
      Exploration", 2024, for growth among a random subset.
    """
    if not candidates >= 0:
        raise ValueError(f"candidates={candidates} must be 0 or more: 1.0 is one an active tile.")
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
                at = _tiles(names[i], index, mask.shape, jnp.shape(leaves[i]))
                if candidates:
                    at = with_candidates(at, mask, candidates, _key(state, i))
                found[i] = at
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


def _key(state: SparseState, leaf: int) -> jax.Array:
    """A key for the step to come and a leaf, other than those of scores."""
    data = state.key
    if jnp.issubdtype(data.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(data)
    # The state does not say which implementation its key is of: threefry, of two words of it.
    key = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for number in (state.count + 1, leaf, CANDIDATES):
        key = jax.random.fold_in(key, number)
    return key


def no_tiles(tiles: PyTree) -> PyTree:
    """The same structure with None everywhere: for a step whose kernels are dense."""
    return jax.tree.map(lambda _: None, tiles, is_leaf=is_tiles)


def to_tiles(params: PyTree, tiles: PyTree, *, of: PyTree | None = None) -> PyTree:
    """Dense kernels as rectangles of their active tiles; what is inactive is left out.

    With `of`, rectangles as others, with no dense kernel on the way: before a mask step those of
    active tiles as those with candidates, which are zero, and after it the reverse.

    Args:
      params: dense parameters, or another tree with their structure, as gradients.
      tiles: of `dstee.tiles`.
      of: the tiles of which `params` are rectangles now, if they are not dense.

    Returns:
      `params` with an array of shape (..., columns of tiles, active * tile[0], tile[1]) for each
      tiled leaf, times a convolution's height and width; the others as they are.

    Raises:
      ValueError: a leaf is not the dense kernel of its tiles, or not the rectangle of those that
        it is `of`; names it, and both shapes.
    """
    if of is None:
        return _each(params, tiles, "kernel_shape", lambda x, at, _: at.take(x))

    def moved(x: jax.Array, at: Tiles, to: Tiles) -> jax.Array:
        return to.moved_from(at)(x, to.zeros(x.dtype))

    return _each(params, of, "rectangle_shape", moved, tiles)


def to_dense(params: PyTree, tiles: PyTree) -> PyTree:
    """Rectangles as dense kernels, zero where no tile is active; undoes `to_tiles`, bit for bit.

    Args:
      params: parameters in tiles, or another tree with their structure.
      tiles: as for `to_tiles`.

    Raises:
      ValueError: a leaf is not the rectangle of its tiles; names it, and both shapes.
    """
    return _each(params, tiles, "rectangle_shape", lambda x, at, _: at.dense(x))


def is_tiles(node: Any) -> bool:
    """Whether a node of a tree of tiles stands for a leaf of the parameters."""
    return node is None or isinstance(node, Tiles | optax.MaskedNode)


def as_kernels(params: PyTree, tiles: PyTree) -> PyTree:
    """Rectangles as dense kernels of fewer inputs (`Tiles.kernel`); raises as `to_dense`."""
    return _each(params, tiles, "rectangle_shape", lambda x, at, _: at.kernel(x))


def _each(
    params: PyTree,
    tiles: PyTree,
    expected: str,
    convert: Callable[[jax.Array, Tiles, Tiles], jax.Array],
    to: PyTree | None = None,
) -> PyTree:
    """`convert(leaf, its tiles, those of the same leaf in `to`)` of each tiled leaf."""
    leaves, treedef = jax.tree.flatten(params)
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    nodes, others = (
        jax.tree.leaves(tree, is_leaf=is_tiles) for tree in (tiles, tiles if to is None else to)
    )
    for found in (nodes, others):
        if len(found) != len(leaves):
            raise ValueError(
                f"tiles have {len(found)} leaves and params {len(leaves)}: pass "
                "dstee.tiles(opt_state, params) of the same parameters."
            )

    def one(name: str, x: Any, at: Any, other: Any) -> Any:
        if not isinstance(at, Tiles):
            return x
        if jnp.shape(x) != getattr(at, expected):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}, where its tiles of {at.tile} need "
                f"{getattr(at, expected)}: the dense kernel is {at.kernel_shape}, the rectangle "
                f"{at.rectangle_shape}."
            )
        if other.tile != at.tile or other.kernel_shape != at.kernel_shape:
            raise ValueError(
                f"{name} is in tiles of {at.tile} of a kernel of shape {at.kernel_shape}, and "
                f"asked for in tiles of {other.tile} of {other.kernel_shape}: pass tiles of the "
                "same parameters."
            )
        return convert(x, at, other)

    return jax.tree.unflatten(treedef, list(map(one, names, leaves, nodes, others)))
