"""Whether tiles pay: one layer's time on this machine, dense and with tiles."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dstee_jax.tiling.products import conv, matmul
from dstee_jax.tiling.tiles import Tiles


class TilesPay(NamedTuple):
    """What `tiles_pay` measured.

    Attributes:
      dense_ms: median time of the dense layer, forward and both gradients, in milliseconds.
      tiled_ms: the same with tiles.
      speedup: dense_ms / tiled_ms; above 1 tiles are faster.
      sparsity: of the tiled kernel: the nearest to the one asked for that whole tiles have.
    """

    dense_ms: float
    tiled_ms: float
    speedup: float
    sparsity: float


def tiles_pay(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel_shape: Sequence[int],
    sparsity: float,
    tile: tuple[int, int] = (32, 32),
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    repeats: int = 9,
) -> TilesPay:
    """Measures whether a layer is faster with tiles than dense, on this machine.

    Times the layer and its gradients with respect to input and kernel, jitted, dense and with
    random tiles in turn, on the default device and on random numbers. The optimizer's step, which
    tiles shorten too, is not in it. For an idle machine, and outside `jit`.

    Args:
      x: the layer's input, or its shape and dtype alone; the kernel has the same dtype.
        Shape (..., inputs) for `dstee.matmul`, (batch, *places, inputs) for `dstee.conv`.
      kernel_shape: of the dense kernel: (inputs, outputs), or (*window, inputs, outputs).
      sparsity: of the kernel, in [0, 1).
      tile: (inputs, outputs) of a tile; must divide the kernel's last two axes.
      strides, padding: of a convolution, as for `dstee.conv`.
      repeats: runs of each form, after one that compiles.

    Returns:
      `TilesPay(dense_ms, tiled_ms, speedup, sparsity)`: both times in milliseconds (medians), the
      first over the second, and the sparsity that was measured.

    Raises:
      ValueError: shapes, tile, dtype, sparsity or repeats do not fit, or it is called within
        `jit`; names the value and the remedy.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
      >>> found = dstee.tiles_pay(x, (128, 96), 0.8, (32, 32), repeats=1)
      >>> found.speedup > 0, found.sparsity  # of 4 tiles in a column one is active
      (True, 0.75)
    """
    shape = tuple(kernel_shape)
    _check(x, shape, sparsity, tile, repeats)
    rows, columns = shape[-2] // tile[0], shape[-1] // tile[1]
    active = min(max(round((1 - sparsity) * rows), 1), rows)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    index = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, rows)[:active]))(
        jax.random.split(next(keys), columns)
    )
    tiles = Tiles(index.astype(jnp.int32), tile, shape)
    given = jax.random.normal(next(keys), x.shape, x.dtype)
    kernel = jax.random.normal(next(keys), tiles.rectangle_shape, x.dtype)
    if isinstance(given, jax.core.Tracer):
        raise ValueError(
            "tiles_pay measures time, and within jit nothing runs: call it before, and build the "
            "program from what it says."
        )

    @jax.jit
    def layer(x: jax.Array, kernel: jax.Array, tiles: Tiles | None) -> Any:
        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if len(shape) == 2:
                return matmul(x, kernel, tiles)
            return conv(x, kernel, tiles, strides=strides, padding=padding)

        y, gradients = jax.vjp(product, x, kernel)
        return y, gradients(y)

    full = tiles.dense(kernel)
    forms = (lambda: layer(given, full, None), lambda: layer(given, kernel, tiles))
    dense_ms, tiled_ms = _medians(forms, repeats)
    return TilesPay(dense_ms, tiled_ms, dense_ms / tiled_ms, 1 - active / rows)


def _medians(forms: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each, called in turn, so that a drifting machine hits both alike."""
    times: list[list[float]] = [[] for _ in forms]
    for turn in range(repeats + 1):
        for run, found in zip(forms, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                found.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(found) for found in times]


def _check(
    x: Any, shape: tuple[int, ...], sparsity: float, tile: tuple[int, int], repeats: int
) -> None:
    fits = len(shape) >= 2 and all(n == int(n) and n >= 1 for n in shape)
    if not fits or (x.ndim != len(shape) if len(shape) > 2 else x.ndim < 1):
        raise ValueError(
            f"x of shape {x.shape} and kernel_shape={shape} are no layer: x (..., inputs) with "
            "(inputs, outputs), or x (batch, *places, inputs) with (*window, inputs, outputs)."
        )
    if x.shape[-1] != shape[-2]:
        raise ValueError(
            f"x of shape {x.shape} has {x.shape[-1]} inputs and kernel_shape={shape} {shape[-2]}: "
            "the last axis of x is the last but one of the kernel."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}, which has no gradient: pass float32, as a layer.")
    if len(tile) != 2 or any(n != int(n) or n < 1 for n in tile):
        raise ValueError(f"tile={tile} must be two sizes of 1 or more, as (32, 32).")
    if shape[-2] % tile[0] or shape[-1] % tile[1]:
        raise ValueError(
            f"tile={tile} does not divide the last two axes of kernel_shape={shape}: choose "
            "another tile."
        )
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1), as 0.9 for 90%.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be 1 or more.")
