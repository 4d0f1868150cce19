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
    jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["tile", "shape"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """Which tiles of a kernel are active; a pytree with one array.

    Attributes:
      index: int32, shape (..., columns, active): in each column of tiles the rows of the active
        ones, sorted; leading axes stack layers.
      tile: inputs and outputs of a tile.
      shape: of the kernel of one layer, as (inputs, outputs) or (height, width, inputs, outputs).
    """

    index: jax.Array
    tile: tuple[int, int]
    shape: Shape

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
        return dataclasses.replace(self, index=index_of(mask, self.index.shape))

    def stays(self, mask: jax.Array) -> jax.Array:
        """Where a mask of tiles is True, as a rectangle; bool."""
        active = jnp.take_along_axis(_by_column(mask, self.index.shape), self.index, axis=-1)
        wide = jnp.broadcast_to(active[..., None, None], (*active.shape, self._depth, self.tile[1]))
        return wide.reshape(self.rectangle_shape)

    def moved(self, mask: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(rectangle, initial) -> rectangle`: that of an earlier mask as one of these tiles.

        `initial` where the mask had no tile.
        """
        place, found = _places(self.renewed(mask).index, self.index)

        def move(rectangle: jax.Array, initial: jax.Array) -> jax.Array:
            tiles = rectangle.reshape(*self.index.shape, self._depth, self.tile[1])
            there = jnp.take_along_axis(tiles, place[..., None, None], axis=-3)
            start = initial.astype(rectangle.dtype).reshape(there.shape)
            return jnp.where(found[..., None, None], there, start).reshape(self.rectangle_shape)

        return move

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
        columns = self.index.shape[-2]
        inputs, outputs = self.tile
        x = kernel.reshape(-1, self.rows, inputs, columns, outputs)
        return x.transpose(3, 1, 0, 2, 4).reshape(columns, self.rows, self._depth, outputs)

    def _take(self, index: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jax.vmap(lambda column, rows: column[rows])(self._cut(kernel), index)
        return x.reshape(index.shape[0], -1, self.tile[1])

    def _put(self, index: jax.Array, rectangle: jax.Array, base: Any = None) -> jax.Array:
        columns, active = index.shape
        inputs, outputs = self.tile
        tiles = rectangle.reshape(columns, active, self._depth, outputs)
        every = jnp.broadcast_to(jnp.arange(self.rows, dtype=jnp.int32), (columns, self.rows))
        place, found = _places(index, every)
        x = jax.vmap(lambda column, rows: column[rows])(tiles, place)
        elsewhere = jnp.zeros_like(x) if base is None else self._cut(base).astype(x.dtype)
        x = jnp.where(found[..., None, None], x, elsewhere)
        x = x.reshape(columns, self.rows, -1, inputs, outputs).transpose(2, 1, 3, 0, 4)
        return x.reshape(self.shape)


def index_of(mask: jax.Array, like: Shape) -> jax.Array:
    """The rows of the active tiles in each column: int32, of the shape `like`.

    Args:
      mask: of tiles, as the state keeps it.
      like: (..., columns, active): as many are active in each column.
    """
    columns = _by_column(mask, like)
    rows = columns.shape[-1]
    places = jnp.where(columns, jnp.arange(rows, dtype=jnp.int32), jnp.int32(rows))
    return jnp.sort(places, axis=-1)[..., : like[-1]]


def may_be_rectangle(shape: Shape, index: jax.Array) -> bool:
    """Whether a leaf of that shape may be the rectangle of tiles at `index` (of the state)."""
    return (
        index.dtype == jnp.int32
        and len(shape) == index.ndim + 1
        and shape[:-2] == index.shape[:-1]
        and shape[-2] % max(index.shape[-1], 1) == 0
    )


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
