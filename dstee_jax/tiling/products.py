"""Products with kernels in tiles: `matmul` and `conv`.

What a column of tiles reads are the rows of tiles that it keeps: they are gathered from the input
and multiplied with the column's matrix, all columns at once. Within the product examples come
last, so that a tile of inputs is one run of memory.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.tiling.tiles import Tiles


def matmul(x: jax.Array, kernel: jax.Array, tiles: Tiles | None = None) -> jax.Array:
    """`x @ kernel`, of a dense kernel or of one in tiles.

    Exact to rounding; differentiable (in reverse mode) with respect to `x` and `kernel`.

    Args:
      x: shape (..., inputs).
      kernel: shape (inputs, outputs); with `tiles`, their rectangle, shape (columns of tiles,
        active * tile[0], tile[1]), as `dstee.to_tiles` makes it.
      tiles: of the kernel, of `dstee.tiles`; None if it is dense.

    Returns:
      Shape (..., outputs), dtype of `x @ kernel`.

    Raises:
      ValueError: shapes do not fit; names them.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> tiles = dstee.Tiles(jnp.array([[0], [1]]), tile=(2, 1), shape=(4, 2))
      >>> dstee.matmul(jnp.arange(4.0), jnp.ones((2, 2, 1)), tiles).tolist()
      [1.0, 5.0]
    """
    if tiles is None:
        if kernel.ndim != 2 or x.shape[-1:] != kernel.shape[:1]:
            raise ValueError(
                f"x of shape {x.shape} and a dense kernel of shape {kernel.shape} do not fit: x "
                "needs (..., inputs), the kernel (inputs, outputs); a rectangle needs tiles=."
            )
        return x @ kernel
    _check(x, kernel, tiles, 2)
    *batch, inputs = x.shape
    examples = x.reshape(math.prod(batch), inputs).T
    return _product(examples, kernel, tiles).T.reshape(*batch, tiles.shape[-1])


def conv(
    x: jax.Array,
    kernel: jax.Array,
    tiles: Tiles | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """A convolution, channels last, with a dense kernel or with one in tiles.

    With tiles it is a sum of products, one for each place of the kernel.

    Args:
      x: shape (batch, *places, inputs).
      kernel: shape (*window, inputs, outputs); with `tiles`, their rectangle.
      tiles: of the kernel; None if it is dense.
      strides: of the window, one number or one for each axis.
      padding: 'SAME', 'VALID', or (before, after) for each axis.

    Returns:
      Shape (batch, *places, outputs).

    Raises:
      ValueError: shapes do not fit; names them.
    """
    axes = x.ndim - 2
    steps = (strides,) * axes if isinstance(strides, int) else tuple(strides)
    if tiles is None:
        if kernel.ndim != x.ndim or x.shape[-1] != kernel.shape[-2]:
            raise ValueError(
                f"x of shape {x.shape} and a dense kernel of shape {kernel.shape} do not fit: x "
                "needs (batch, *places, inputs), the kernel (*window, inputs, outputs); a "
                "rectangle needs tiles=."
            )
        places = "".join("0123456789"[:axes])
        numbers = (f"N{places}C", f"{places}IO", f"N{places}C")
        return lax.conv_general_dilated(x, kernel, steps, padding, dimension_numbers=numbers)
    _check(x, kernel, tiles, axes + 2)
    window = tiles.shape[:-2]
    pads = (
        padding
        if not isinstance(padding, str)
        else lax.padtype_to_pads(x.shape[1:-1], window, steps, padding)
    )
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    out = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:-1], window, steps, strict=True)]
    # Channels first, examples last: each place of the window is a slice of one array.
    x = jnp.moveaxis(x, (0, -1), (-1, 0))
    columns, active = tiles.index.shape
    by_place = kernel.reshape(columns, active, math.prod(window), *tiles.tile)
    total: Any = 0
    for i, at in enumerate(_places(window)):
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(at, out, steps, strict=True)]
        seen = lax.slice(x, (0, *at, 0), (x.shape[0], *stop, x.shape[-1]), (1, *steps, 1)).reshape(
            x.shape[0], -1
        )
        part = by_place[:, :, i].reshape(columns, -1, tiles.tile[1])
        total += _product(seen, part, tiles)
    y = total.reshape(tiles.shape[-1], *out, x.shape[-1])
    return jnp.moveaxis(y, (0, -1), (-1, 0))


def _places(window: Sequence[int]) -> list[tuple[int, ...]]:
    """The places of a window, in row-major order."""
    found: list[tuple[int, ...]] = [()]
    for n in window:
        found = [(*at, i) for at in found for i in range(n)]
    return found


def _product(x: jax.Array, kernel: jax.Array, tiles: Tiles) -> jax.Array:
    """kernel.T @ x, with x of shape (inputs, examples), for one place of the kernel."""
    seen = _gathered(x.reshape(tiles.rows, tiles.tile[0], x.shape[-1]), tiles.index)
    seen = seen.reshape(*kernel.shape[:2], x.shape[-1])
    y = jnp.einsum("cio,cie->coe", kernel, seen)
    return y.reshape(tiles.shape[-1], x.shape[-1])


@jax.custom_vjp
def _gathered(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index]: of rows of tiles (rows, inputs, examples) those that each column reads."""
    return x[index]


def _forward(x: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
    return x[index], (x, index)


def _backward(kept: Any, grad: jax.Array) -> tuple[jax.Array, None]:
    x, index = kept
    by_tile = functools.partial(_scattered, x)
    return lax.platform_dependent(
        grad, index, cpu=by_tile, default=functools.partial(_summed, x)
    ), None


def _scattered(x: jax.Array, grad: jax.Array, index: jax.Array) -> jax.Array:
    """What the columns have for each row of tiles, added up; a scatter."""
    return jax.linear_transpose(lambda x: x[index], x)(grad)[0]


def _summed(x: jax.Array, grad: jax.Array, index: jax.Array) -> jax.Array:
    """The same by a product with ones and zeros: GPUs make a slow loop of the scatter."""
    rows = jnp.arange(x.shape[0], dtype=index.dtype)
    ones = (index[..., None] == rows).astype(grad.dtype)
    return jnp.einsum("cfr,cfie->rie", ones, grad, precision=lax.Precision.HIGHEST)


_gathered.defvjp(_forward, _backward)


def _check(x: jax.Array, kernel: jax.Array, tiles: Tiles, ndim: int) -> None:
    if tiles.index.ndim != 2 or len(tiles.shape) != ndim:
        raise ValueError(
            f"tiles of a kernel of shape {tiles.kernel_shape} and index {tiles.index.shape} are "
            f"not of one layer with {ndim} axes: scan over stacked layers, or use "
            f"{'conv' if ndim == 2 else 'matmul'}."
        )
    if kernel.shape != tiles.rectangle_shape:
        raise ValueError(
            f"the kernel has shape {kernel.shape}, where its tiles need the rectangle "
            f"{tiles.rectangle_shape} of a dense {tiles.kernel_shape}: pass "
            "dstee.to_tiles(params, tiles) with the same tiles, or no tiles with a dense kernel."
        )
    if x.ndim < ndim - 1 or x.shape[-1] != tiles.shape[-2]:
        raise ValueError(
            f"x has shape {x.shape}, where a kernel of shape {tiles.shape} needs "
            f"{tiles.shape[-2]} on the last axis" + (f" of {ndim}." if ndim > 2 else ".")
        )
