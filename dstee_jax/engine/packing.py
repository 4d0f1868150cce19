"""Packed leaves: the active weights alone, in row-major order, part by part.

`indices` of a leaf has shape (*grid, n): where the n active weights of each part are, counted in
row-major order within the part. A packed array has shape (*grid[:-1], grid[-1] * n): as many
axes as the leaf, so that it lies on devices by the leaf's own PartitionSpec, and rules that look
at the number of axes (weight decay for matrices only) still hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dstee_jax.engine import rows
from dstee_jax.engine.moments import owners
from dstee_jax.selection.parts import Grid, flatten, is_sharded, sharding_of, unflatten
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, mask_leaves, path_name


def positions(mask: jax.Array, count: int, grid: Grid) -> jax.Array:
    """Where a mask with `count` True in each part is True: uint32, shape (*grid, count)."""

    def of_part(row: jax.Array) -> jax.Array:
        return rows.positions(row, count)

    return _each_part(of_part, flatten(mask, grid)).reshape(*grid, count)


def new_indices(masks: Sequence[Any], indices: Sequence[Any]) -> list[Any]:
    """Where the active weights of new masks are, for the leaves that have indices."""
    pairs = zip(masks, indices, strict=True)
    return [
        where if is_dense(where) else positions(mask, where.shape[-1], where.shape[:-1])
        for mask, where in pairs
    ]


def ranks(mask: jax.Array, indices: jax.Array) -> jax.Array:
    """How many True a mask has in the part before each of `indices`: uint32, their shape."""
    *grid, _ = indices.shape
    found = _each_part(rows.rank, flatten(mask, tuple(grid)), _parts(indices))
    return found.reshape(indices.shape)


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The entries of a leaf at `indices`, packed."""
    *grid, _ = indices.shape
    found = _each_part(rows.take, flatten(x, tuple(grid)), _parts(indices))
    return _merge(found.reshape(indices.shape))


def put(base: jax.Array, indices: jax.Array, packed: jax.Array) -> jax.Array:
    """A leaf with the packed values at `indices`, and `base` elsewhere."""
    *grid, _ = indices.shape
    values = _parts(_reshape_like(packed, indices))
    new = _each_part(rows.put, flatten(base, tuple(grid)), _parts(indices), values)
    return unflatten(new, base.shape, tuple(grid))


def reorder(packed: jax.Array, ranks: jax.Array) -> jax.Array:
    """In each part, the packed values of those ranks."""
    values = _parts(_reshape_like(packed, ranks))
    return _merge(_each_part(rows.take_any, values, _parts(ranks)).reshape(ranks.shape))


def zeros(indices: jax.Array, dtype: Any) -> jax.Array:
    """A packed leaf of zeros."""
    return jnp.zeros_like(_merge(indices), dtype)


def pack(tree: PyTree, indices: PyTree) -> PyTree:
    """A tree like the parameters with its leaves packed, where `indices` has some."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, take_each(leaves, mask_leaves(indices, tree)))


def take_each(leaves: Sequence[jax.Array], indices: Sequence[Any]) -> list[jax.Array]:
    """Leaves packed, those without indices (`MaskedNode`) as they are."""
    pairs = zip(leaves, indices, strict=True)
    return [x if is_dense(where) else take(x, where) for x, where in pairs]


def add(weight: jax.Array, indices: jax.Array, update: jax.Array) -> jax.Array:
    """weight + update of a leaf, where the update is packed."""
    new = take(weight, indices) + update
    return put(weight, indices, new.astype(weight.dtype))


def spread(weight: jax.Array, indices: jax.Array, update: jax.Array) -> jax.Array:
    """An update of the whole leaf: -weight where a packed one has nothing."""
    update = exact(update, weight)
    return put(-weight.astype(update.dtype), indices, update)


def exact(update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update in a type in which -weight cancels the weight."""
    return update.astype(jnp.promote_types(update.dtype, weight.dtype))


def packed_shape(indices: jax.Array) -> tuple[int, ...]:
    """The shape of packed arrays with these indices (an array or its shape)."""
    *grid, n = indices.shape
    return (*grid[:-1], grid[-1] * n)


def _merge(x: jax.Array) -> jax.Array:
    """The last two axes as one: by part, to packed."""
    shape = packed_shape(x)
    if not is_sharded(x):
        return x.reshape(shape)
    place = jax.typeof(x).sharding
    return jnp.reshape(x, shape, out_sharding=NamedSharding(place.mesh, P(*place.spec[:-1])))


def _reshape_like(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.reshape(x, like.shape, out_sharding=sharding_of(like))


def _parts(indices: jax.Array) -> jax.Array:
    *grid, n = indices.shape
    return indices.reshape(*(parts for parts in grid if parts > 1), n)


def _each_part(function: Callable[..., jax.Array], *parts: jax.Array) -> jax.Array:
    for _ in range(parts[0].ndim - 1):
        function = jax.vmap(function)
    return function(*parts)


def check_state(inner: optax.GradientTransformation, params: PyTree, packed: PyTree) -> None:
    """Raise a ValueError that names the leaf if `inner` keeps more than a value a weight.

    Args:
      inner: the optimizer.
      params: shapes of the parameters.
      packed: shapes of the same, with packed leaves.
    """
    names = []
    for tree in (params, packed):
        state = leaves_with_path(jax.eval_shape(inner.init, tree))
        leaves = [(path, leaf) for path, leaf in state if not is_dense(leaf)]
        names.append([path_name(path) for path, _ in leaves])
        for (path, leaf), owner in zip(leaves, owners(inner, tree), strict=True):
            if not isinstance(owner, int) and leaf.ndim:
                raise ValueError(
                    f"packed=True: the inner optimizer keeps {path_name(path)} of shape "
                    f"{leaf.shape}, which is neither a scalar nor one value for each weight of a "
                    "parameter: leave packed=True out, or take another optimizer, as optax.adamw."
                )
    if names[0] != names[1]:
        other = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"packed=True: the inner optimizer treats packed leaves in another way than whole "
            f"ones; only one of the two has {other[:3]}: leave packed=True out."
        )
