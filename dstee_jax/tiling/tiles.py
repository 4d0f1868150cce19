"""`Tiles`: which tiles of a kernel are active, and the kernel's active part as one dense array.

Of a kernel (..., inputs, outputs) cut into tiles, whose other axes belong to the tile, column c
of tiles keeps the tiles in the rows `index[c]`. One below the other they are a matrix; the
kernel is a stack of them, its rectangle: (columns, active rows * others * tile[0], tile[1]).
Nothing here scatters: what a tile is in the other form is gathered both ways.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index", "active"], meta_fields=["tile", "shape"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Which tiles of a kernel are active; a pytree with one array, or two with candidates.

    Attributes:
      index: int32, shape (..., columns, active): in each column of tiles the rows of the active
        ones, sorted; leading axes stack layers.
      tile: inputs and outputs of a tile.
      shape: of the kernel of one layer, as (inputs, outputs) or (height, width, inputs, outputs).
      active: if candidates are among the tiles, int32, shape (..., columns, active): which of
        `index` are not; None if all are active. Products take candidates to be zero, and give
        their gradients.
    """

    index: jax.Array
    tile: tuple[int, int]
    shape: Shape
    active: jax.Array | None = None

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return self.shape[-2] // self.tile[0]

    @property
    def kernel_shape(self) -> Shape:
        """Of the dense kernel, all layers."""
        return (*self._stack, *self.shape)

    @property
    def rectangle_shape(self) -> Shape:
        """Of the kernel's active part, all layers."""
        *stack, columns, active = self.index.shape
        return (*stack, columns, active * self._depth, self.tile[1])

    def take(self, kernel: jax.Array) -> jax.Array:
        """The active part of a dense kernel."""
        return self._each_layer(self._take, kernel)

    def put(self, base: jax.Array, rectangle: jax.Array) -> jax.Array:
        """A dense kernel with that active part, and `base` elsewhere."""
        return self._each_layer(self._put, rectangle, base)

    def dense(self, rectangle: jax.Array) -> jax.Array:
        """The dense kernel with that active part, zero elsewhere."""
        return self._each_layer(self._put, rectangle)

    def zeros(self, dtype: Any) -> jax.Array:
        """A rectangle of zeros."""
        return jnp.zeros(self.rectangle_shape, dtype)

    def renewed(self, mask: jax.Array) -> "Tiles":
        """As many tiles of another mask, of shape (..., rows, columns)."""
        index = index_of(mask, self.index.shape)
        return dataclasses.replace(self, index=index, active=None)

    def stays(self, mask: jax.Array) -> jax.Array:
        """Where a mask of tiles is True, as a rectangle; bool."""
        active = jnp.take_along_axis(_by_column(mask, self.index.shape), self.index, axis=-1)
        wide = jnp.broadcast_to(active[..., None, None], (*active.shape, self._depth, self.tile[1]))
        return wide.reshape(self.rectangle_shape)

    def moved(self, mask: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(rectangle, initial) -> rectangle`: that of an earlier mask as one of these tiles.

        `initial` where the mask had no tile.
        """
        return self.moved_from(self.renewed(mask))

    def moved_from(self, other: "Tiles") -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(rectangle, initial) -> rectangle`: that of other tiles of the kernel as one of these.

        `initial` where the others have no tile.
        """
        place, found = _places(other.index, self.index)

        def move(rectangle: jax.Array, initial: jax.Array) -> jax.Array:
            tiles = rectangle.reshape(*other.index.shape, self._depth, self.tile[1])
            there = jnp.take_along_axis(tiles, place[..., None, None], axis=-3)
            start = initial.astype(rectangle.dtype).reshape(there.shape)
            return jnp.where(found[..., None, None], there, start).reshape(self.rectangle_shape)

        return move

    def kernel(self, rectangle: jax.Array) -> jax.Array:
        """A rectangle as a dense kernel of fewer inputs: of each column the tiles that it has."""
        columns = self.index.shape[-2]

        def one(_: jax.Array, x: jax.Array) -> jax.Array:
            return self._join(x.reshape(columns, -1, self._depth, self.tile[1]))

        return self._each_layer(one, rectangle)

    def rectangle(self, kernel: jax.Array) -> jax.Array:
        """A dense kernel of fewer inputs as a rectangle; undoes `kernel`."""
        return self._each_layer(lambda _, x: self._cut(x), kernel).reshape(self.rectangle_shape)

    def of_these(self, kept: jax.Array) -> jax.Array:
        """What is kept for tiles, a mask or a counter, as that of the kernel of fewer inputs."""
        found = jnp.take_along_axis(_by_column(kept, self.index.shape), self.index, axis=-1)
        return found.swapaxes(-1, -2).reshape(*kept.shape[:-2], *found.shape[:-3:-1])

    def put_these(self, kept: jax.Array, base: jax.Array) -> jax.Array:
        """What is kept for tiles: `kept`, of the kernel of fewer inputs, and `base` elsewhere."""
        columns = _by_column(base, self.index.shape)
        place, found = _places(self.index, _rows(columns.shape))
        there = jnp.take_along_axis(_by_column(kept, self.index.shape), place, axis=-1)
        return jnp.where(found, there, columns).swapaxes(-1, -2).reshape(base.shape)

    @property
    def _stack(self) -> Shape:
        return self.index.shape[:-2]

    @property
    def _depth(self) -> int:
        """Rows of a tile in the rectangle: its inputs, at each place of a convolution."""
        return math.prod(self.shape[:-2]) * self.tile[0]

    def _each_layer(self, one: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        for _ in self._stack:
            one = jax.vmap(one)
        return one(self.index, *arrays)

    def _cut(self, kernel: jax.Array) -> jax.Array:
        """A layer's dense kernel as (columns, rows, depth, outputs)."""
        columns, rows = self.index.shape[-2], kernel.shape[-2] // self.tile[0]
        inputs, outputs = self.tile
        x = kernel.reshape(-1, rows, inputs, columns, outputs)
        return x.transpose(3, 1, 0, 2, 4).reshape(columns, rows, self._depth, outputs)

    def _join(self, x: jax.Array) -> jax.Array:
        """Undoes `_cut`."""
        columns, rows = x.shape[:2]
        inputs, outputs = self.tile
        x = x.reshape(columns, rows, -1, inputs, outputs).transpose(2, 1, 3, 0, 4)
        return x.reshape(*self.shape[:-2], rows * inputs, self.shape[-1])

    def _take(self, index: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jax.vmap(lambda column, rows: column[rows])(self._cut(kernel), index)
        return x.reshape(index.shape[0], -1, self.tile[1])

    def _put(self, index: jax.Array, rectangle: jax.Array, base: Any = None) -> jax.Array:
        columns, active = index.shape
        tiles = rectangle.reshape(columns, active, self._depth, self.tile[1])
        place, found = _places(index, _rows((columns, self.rows)))
        x = jax.vmap(lambda column, rows: column[rows])(tiles, place)
        elsewhere = jnp.zeros_like(x) if base is None else self._cut(base).astype(x.dtype)
        return self._join(jnp.where(found[..., None, None], x, elsewhere))


def index_of(mask: jax.Array, like: Shape) -> jax.Array:
    """The rows of the active tiles in each column: int32, of the shape `like`.

    Args:
      mask: of tiles, as the state keeps it.
      like: (..., columns, active): as many are active in each column.
    """
    columns = _by_column(mask, like)
    places = jnp.where(columns, _rows(columns.shape), jnp.int32(columns.shape[-1]))
    return jnp.sort(places, axis=-1)[..., : like[-1]]


def may_be_rectangle(shape: Shape, index: jax.Array, mask: jax.Array) -> bool:
    """Whether a leaf of that shape may be a rectangle: of the state's tiles, or of more."""
    if index.dtype != jnp.int32 or len(shape) != index.ndim + 1 or shape[:-2] != index.shape[:-1]:
        return False
    pairs = zip(shape[-2:], mask.shape[-2:], strict=True)
    may_be_dense = len(shape) == mask.ndim and not any(n % parts for n, parts in pairs)
    return not may_be_dense or shape[-2] % max(index.shape[-1], 1) == 0


def with_candidates(tiles: Tiles, mask: jax.Array, share: float, key: jax.Array) -> Tiles:
    """Active tiles and, in each column, some inactive ones drawn at random.

    Args:
      tiles: the active ones.
      mask: of tiles, as the state keeps it.
      share: inactive ones for each active one, rounded up; at most all.
      key: PRNG key.
    """
    active = _by_column(mask, tiles.index.shape)
    n, rows = tiles.index.shape[-1], tiles.rows
    wanted = n + math.ceil(round(min(share * n, rows - n), 6))
    draw = jax.random.bits(key, active.shape, jnp.uint32) | jnp.uint32(1)
    order = jnp.argsort(jnp.where(active, jnp.uint32(0), draw), axis=-1)  # active ones first
    index = jnp.sort(order[..., :wanted].astype(jnp.int32), axis=-1)
    return dataclasses.replace(tiles, index=index, active=_places(index, tiles.index)[0])


def _rows(shape: Shape) -> jax.Array:
    """The number of its row for each tile, (..., columns, rows); int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _by_column(mask: jax.Array, like: Shape) -> jax.Array:
    """A mask of tiles as (..., columns, rows)."""
    stack, columns = like[:-2], like[-2]
    return mask.reshape(*stack, -1, columns).swapaxes(-1, -2)


def _places(index: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In each column, where `wanted` rows are in the sorted `index`, and whether they are."""
    search = functools.partial(jnp.searchsorted, method="sort")
    for _ in range(index.ndim - 1):
        search = jax.vmap(search)
    place = jnp.minimum(search(index, wanted), index.shape[-1] - 1).astype(jnp.int32)
    return place, jnp.take_along_axis(index, place, axis=-1) == wanted
