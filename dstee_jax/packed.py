"""Packed leaves: the active weights alone, in row-major order, part by part.

`indices` of a leaf has shape (*grid, n): where the n active weights of each part are, counted in
row-major order within the part. A packed array has shape (*grid[:-1], grid[-1] * n): as many
axes as the leaf, so that it lies on devices by the leaf's own PartitionSpec, and rules that look
at the number of axes (weight decay for matrices only) still hold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dstee_jax.bisection import INDEX
from dstee_jax.moments import owners
from dstee_jax.parts import Grid, flatten, is_sharded, sharding_of, unflatten
from dstee_jax.state import PyTree, is_dense, leaves_with_path, mask_leaves, path_name


class SparseUpdate(NamedTuple):
    """The update of a leaf's active weights; the others are zero and stay so."""

    indices: jax.Array  # uint32, shape (*grid, n)
    values: jax.Array  # packed


def positions(mask: jax.Array, count: int, grid: Grid) -> jax.Array:
    """Where a mask with `count` True in each part is True: uint32, shape (*grid, count)."""

    def of_part(row: jax.Array) -> jax.Array:
        rank = jnp.cumsum(row, dtype=INDEX)
        place = jnp.where(row, rank - jnp.ones((), INDEX), jnp.array(count, INDEX))
        where = jnp.arange(row.size, dtype=INDEX)
        return _set(jnp.zeros(count, INDEX), place, where, lax.GatherScatterMode.FILL_OR_DROP)

    return _each_part(of_part, flatten(mask, grid)).reshape(*grid, count)


def take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The entries of a leaf at `indices`, packed."""
    *grid, _ = indices.shape

    def of_part(row: jax.Array, where: jax.Array) -> jax.Array:
        return lax.gather(
            row,
            where[:, None],
            lax.GatherDimensionNumbers((), collapsed_slice_dims=(0,), start_index_map=(0,)),
            slice_sizes=(1,),
            indices_are_sorted=True,
            unique_indices=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    found = _each_part(of_part, flatten(x, tuple(grid)), _parts(indices))
    return _merge(found.reshape(indices.shape))


def put(base: jax.Array, indices: jax.Array, packed: jax.Array) -> jax.Array:
    """A leaf with the packed values at `indices`, and `base` elsewhere."""
    *grid, _ = indices.shape

    def of_part(row: jax.Array, where: jax.Array, values: jax.Array) -> jax.Array:
        return _set(row, where, values, lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    values = _parts(_reshape_like(packed, indices))
    new = _each_part(of_part, flatten(base, tuple(grid)), _parts(indices), values)
    return unflatten(new, base.shape, tuple(grid))


def pack(tree: PyTree, indices: PyTree) -> PyTree:
    """A tree like the parameters with its leaves packed, where `indices` has some."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, take_each(leaves, mask_leaves(indices, tree)))


def take_each(leaves: Sequence[jax.Array], indices: Sequence[Any]) -> list[jax.Array]:
    """Leaves packed, those without indices (`MaskedNode`) as they are."""
    rows = zip(leaves, indices, strict=True)
    return [x if is_dense(where) else take(x, where) for x, where in rows]


def add(weight: jax.Array, indices: Any, update: jax.Array) -> jax.Array:
    """weight + update of a leaf, where the update may be packed."""
    if is_dense(indices):
        return weight + update.astype(weight.dtype)
    return put(weight, indices, take(weight, indices) + update.astype(weight.dtype))


def _set(row: jax.Array, where: jax.Array, values: jax.Array, mode: Any) -> jax.Array:
    """row.at[where].set(values); jax.numpy would turn uint32 indices of big rows into int32."""
    numbers = lax.ScatterDimensionNumbers((), (0,), scatter_dims_to_operand_dims=(0,))
    known = {"indices_are_sorted": True, "unique_indices": True}
    if mode is lax.GatherScatterMode.FILL_OR_DROP:  # what is dropped stands between the others
        known = {}
    return lax.scatter(row, where[:, None], values, numbers, mode=mode, **known)


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


def _each_part(function: Callable[..., jax.Array], *rows: jax.Array) -> jax.Array:
    for _ in range(rows[0].ndim - 1):
        function = jax.vmap(function)
    return function(*rows)


def check_state(inner: optax.GradientTransformation, params: PyTree, packed: PyTree) -> None:
    """Raise a ValueError that names the leaf if `inner` keeps more than a value a weight.

    Args:
      inner: the optimizer.
      params: shapes of the parameters.
      packed: shapes of the same, with packed leaves.
    """
    states = [jax.eval_shape(inner.init, tree) for tree in (params, packed)]
    names = []
    for state, tree in zip(states, (params, packed), strict=True):
        leaves = [(path, leaf) for path, leaf in leaves_with_path(state) if not is_dense(leaf)]
        names.append([path_name(path) for path, _ in leaves])
        for (path, leaf), owner in zip(leaves, owners(state, tree), strict=True):
            if owner is None and leaf.ndim:
                raise ValueError(
                    f"packed=True: the inner optimizer keeps {path_name(path)} of shape "
                    f"{leaf.shape}, which is neither a scalar nor one value for each weight: "
                    "leave packed=True out, or take another optimizer, as optax.adamw."
                )
    if names[0] != names[1]:
        other = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(
            f"packed=True: the inner optimizer treats packed leaves in another way than whole "
            f"ones; only one of the two has {other[:3]}: leave packed=True out."
        )
