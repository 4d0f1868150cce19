"""Packed leaves: the active weights alone, and where they are.

A place says where the active weights of a leaf are: `Entries`, in row-major order, part by part;
`Tiles`, whole tiles; or a `MaskedNode` for a leaf that is not packed. Both take a leaf's active
weights (`take`), put them back (`put`), and follow a mask step (`renewed`, `stays`, `moved`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dstee_jax.engine import rows
from dstee_jax.engine.moments import owners
from dstee_jax.selection.parts import Grid, flatten, is_sharded, sharding_of, unflatten
from dstee_jax.tiling.tiles import Tiles
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """Where the active weights of a leaf are, one by one.

    A packed array has shape (*grid[:-1], grid[-1] * n): as many axes as the leaf, so that it lies
    on devices by the leaf's own PartitionSpec, and rules that look at the number of axes (weight
    decay for matrices only) still hold.

    Attributes:
      index: uint32, shape (*grid, n): where the n active weights of each part are, counted in
        row-major order within the part.
    """

    index: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """The entries of a leaf that are active, packed."""
        found = _each_part(rows.take, flatten(x, self._grid), _parts(self.index))
        return _merge(found.reshape(self.index.shape))

    def put(self, base: jax.Array, packed: jax.Array) -> jax.Array:
        """A leaf with the packed values in their places, and `base` elsewhere."""
        values = _parts(_reshape_like(packed, self.index))
        new = _each_part(rows.put, flatten(base, self._grid), _parts(self.index), values)
        return unflatten(new, base.shape, self._grid)

    def zeros(self, dtype: Any) -> jax.Array:
        """A packed leaf of zeros."""
        return jnp.zeros_like(_merge(self.index), dtype)

    def renewed(self, mask: jax.Array) -> "Entries":
        """Where as many active weights of another mask are."""
        return Entries(positions(mask, self.index.shape[-1], self._grid))

    def stays(self, mask: jax.Array) -> jax.Array:
        """Where a mask is True, packed."""
        return self.take(mask)

    def moved(self, mask: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(packed, initial) -> packed`: values of an earlier mask, packed, in these places.

        `initial` where that mask had none.
        """
        ranks = _each_part(rows.rank, flatten(mask, self._grid), _parts(self.index))
        stays = self.take(mask)

        def move(packed: jax.Array, initial: jax.Array) -> jax.Array:
            values = _parts(_reshape_like(packed, self.index))
            there = _merge(_each_part(rows.take_any, values, ranks).reshape(self.index.shape))
            return jnp.where(stays, there, initial.astype(packed.dtype))

        return move

    @property
    def _grid(self) -> Grid:
        return tuple(self.index.shape[:-1])


def place(index: Any, mask: Any, shape: tuple[int, ...]) -> Any:
    """Where the active weights of a leaf of that shape are, from what the state has of it."""
    if is_dense(index):
        return index
    if index.dtype != jnp.int32:
        return Entries(index)
    stack = index.ndim - 2
    tile = tuple(n // parts for n, parts in zip(shape[-2:], mask.shape[-2:], strict=True))
    return Tiles(index, tile, tuple(shape[stack:]))


def positions(mask: jax.Array, count: int, grid: Grid) -> jax.Array:
    """Where a mask with `count` True in each part is True: uint32, shape (*grid, count)."""

    def of_part(row: jax.Array) -> jax.Array:
        return rows.positions(row, count)

    return _each_part(of_part, flatten(mask, grid)).reshape(*grid, count)


def renewed(masks: Sequence[Any], places: Sequence[Any]) -> list[Any]:
    """Where the active weights of new masks are, for the leaves that are packed."""
    pairs = zip(masks, places, strict=True)
    return [where if is_dense(where) else where.renewed(mask) for mask, where in pairs]


def pack(tree: PyTree, places: Sequence[Any]) -> PyTree:
    """A tree like the parameters with its leaves packed, where `places` has some."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, take_each(leaves, places))


def take_each(leaves: Sequence[jax.Array], places: Sequence[Any]) -> list[jax.Array]:
    """Leaves packed, those without a place (`MaskedNode`) as they are."""
    pairs = zip(leaves, places, strict=True)
    return [x if is_dense(where) else where.take(x) for x, where in pairs]


def add(weight: jax.Array, where: Any, update: jax.Array) -> jax.Array:
    """weight + update of a leaf, where the update is packed.

    All is read before any is written, so that a leaf is written in place on a GPU too, where XLA
    would have one kernel do both, on a copy.
    """
    new = lax.optimization_barrier((where.take(weight) + update).astype(weight.dtype))
    return where.put(weight, new)


def spread(weight: jax.Array, where: Any, update: jax.Array) -> jax.Array:
    """An update of the whole leaf: -weight where a packed one has nothing."""
    update = exact(update, weight)
    return where.put(-weight.astype(update.dtype), update)


def exact(update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update in a type in which -weight cancels the weight."""
    return update.astype(jnp.promote_types(update.dtype, weight.dtype))


def _merge(x: jax.Array) -> jax.Array:
    """The last two axes as one: by part, to packed."""
    *grid, n = x.shape
    shape = (*grid[:-1], grid[-1] * n)
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
