"""A step of active tiles and candidates beside them, in which no dense gradient is made.

Of each column of tiles only some are there, the active ones and the candidates, and only they are
looked at. One below the other they are a dense kernel of fewer inputs. So what the state keeps for
tiles is cut down to them, the step is one of dense kernels, and what it made is put back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dstee_jax.engine.config import Config
from dstee_jax.engine.inputs import leaves_like
from dstee_jax.engine.rectangles import check_rectangle
from dstee_jax.state import SparseState
from dstee_jax.tiling.forms import as_kernels, is_tiles
from dstee_jax.tiling.tiles import Tiles, index_of
from dstee_jax.trees import (
    PyTree,
    is_dense,
    leaves_with_path,
    mask_leaves,
    path_name,
    replace_leaves,
)

# (updates, state, params, shapes of the dense parameters) -> (updates or params, state)
Update = Callable[[PyTree, SparseState, PyTree, PyTree], tuple[PyTree, SparseState]]


def update_among(
    update: Update,
    config: Config,
    updates: PyTree,
    state: SparseState,
    params: PyTree,
    tiles: PyTree,
) -> tuple[PyTree, SparseState]:
    """A step whose kernels are rectangles of active tiles and candidates, before and after it.

    Args:
      update: the step of dense kernels.
      config: what `transform` was asked for.
      updates, state, params: as optax has them, in rectangles.
      tiles: of these, of `dstee.tiles`.

    Raises:
      ValueError: parameters, tiles and state do not fit, and the shapes that do not; or an option
        reads what is not there.
    """
    leaves_like(params, updates, "grads")
    kernels = as_kernels(params, tiles)
    leaves, treedef = jax.tree.flatten(params)
    where = jax.tree.leaves(tiles, is_leaf=is_tiles)
    _check(config, state, params, where)

    def each(one: Callable[..., Any], *trees: PyTree) -> PyTree:
        """`one(tiles, *leaves of the trees)` if in tiles; else what the first tree has."""
        rows = zip(where, *(mask_leaves(tree, params) for tree in trees), strict=True)
        new = [one(at, *row) if isinstance(at, Tiles) else row[0] for at, *row in rows]
        return replace_leaves(trees[0], params, new)

    shapes = [
        jax.ShapeDtypeStruct(
            at.kernel_shape if isinstance(at, Tiles) else jnp.shape(x), jnp.result_type(x)
        )
        for at, x in zip(where, leaves, strict=True)
    ]
    masks = each(Tiles.of_these, state.masks)
    cut = state._replace(
        masks=masks,
        counters=each(Tiles.of_these, state.counters),
        indices=each(lambda _, index, mask: index_of(mask, index.shape), state.indices, masks),
    )
    given = as_kernels(updates, tiles), cut, kernels, jax.tree.unflatten(treedef, shapes)
    made, new = update(*given)
    new = new._replace(
        masks=each(Tiles.put_these, new.masks, state.masks),
        counters=each(Tiles.put_these, new.counters, state.counters),
        indices=each(lambda at, index: jnp.take_along_axis(at.index, index, -1), new.indices),
    )
    pairs = zip(where, jax.tree.leaves(made), strict=True)
    out = [at.rectangle(x) if isinstance(at, Tiles) else x for at, x in pairs]
    return jax.tree.unflatten(treedef, out), new


def _check(config: Config, state: SparseState, params: PyTree, where: list[Any]) -> None:
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    indices = mask_leaves(state.indices, params) if config.tiled else [None] * len(names)
    for name, at, index in zip(names, where, indices, strict=True):
        if not isinstance(at, Tiles):
            continue
        shape = None if index is None or is_dense(index) else index.shape
        what = f"{name} of shape {at.rectangle_shape}"
        if shape is None or shape[:-1] != at.index.shape[:-1] or shape[-1] > at.index.shape[-1]:
            raise ValueError(
                f"{what} is a rectangle of tiles {at.index.shape}, and opt_state has "
                f"{'none of it' if shape is None else shape}: pass dstee.tiles(opt_state, params, "
                "candidates=1.0) of the same state."
            )
        if shape[-1] == at.index.shape[-1] < at.rows:
            raise ValueError(
                f"{what} has the {shape[-1]} active tiles of each column and no candidates, so "
                "that nothing can grow: pass dstee.tiles(opt_state, params, candidates=1.0), or "
                "mask_step=False and no tiles=."
            )
        check_rectangle(config, what)
        if config.grow_batches > 1:
            raise ValueError(
                f"{what} is a rectangle of tiles, and grow_batches={config.grow_batches} sums "
                "gradients of all weights: leave it out, or make such steps dense."
            )
