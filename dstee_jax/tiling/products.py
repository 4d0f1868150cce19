"""Products with kernels in tiles: `matmul` and `conv`.

What a column of tiles reads are the rows of tiles that it keeps: they are gathered from the input
and multiplied with the column's matrix, all columns at once or, on a CPU, in groups. Within the
product examples come last, so that a tile of inputs is one run of memory; the backward pass
gathers again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.parts import varying_axes
from dstee_jax.tiling.tiles import Tiles


def matmul(
    x: jax.Array, kernel: jax.Array, tiles: Tiles | None = None, *, axis: int = -1
) -> jax.Array:
    """`x @ kernel`, of a dense kernel or of one in tiles.

    Exact to rounding; differentiable (in reverse mode) with respect to `x` and `kernel`.

    Args:
      x: shape (..., inputs), or (inputs, ...) with `axis=0`.
      kernel: shape (inputs, outputs); with `tiles`, their rectangle, shape (columns of tiles,
        active * tile[0], tile[1]), as `dstee.to_tiles` makes it.
      tiles: of the kernel, of `dstee.tiles`; None if it is dense.
      axis: of x that has the inputs, and of the result that has the outputs: -1 or 0. Products
        with tiles are computed with features first: between layers that follow each other, 0
        saves transposing what the first one gives.

    Returns:
      Shape (..., outputs), or (outputs, ...); dtype of `x @ kernel`.

    Raises:
      ValueError: shapes do not fit; names them. Another axis.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> tiles = dstee.Tiles(jnp.array([[0], [1]]), tile=(2, 1), shape=(4, 2))
      >>> dstee.matmul(jnp.arange(4.0), jnp.ones((2, 2, 1)), tiles).tolist()
      [1.0, 5.0]
      >>> dstee.matmul(jnp.ones((4, 3)), jnp.ones((2, 2, 1)), tiles, axis=0).shape
      (2, 3)
    """
    _check_examples(x, kernel)
    if axis not in (-1, 0):
        raise ValueError(f"axis={axis} of x must be -1, features last, or 0, features first.")
    if tiles is None:
        if kernel.ndim != 2 or x.ndim < 1 or x.shape[axis] != kernel.shape[0]:
            raise ValueError(
                f"x of shape {x.shape} and a dense kernel of shape {kernel.shape} do not fit: x "
                f"needs {_LAYOUT[axis]}, the kernel (inputs, outputs); a rectangle needs tiles=."
            )
        return x @ kernel if axis else jnp.tensordot(kernel, x, (0, 0))
    _check(x, kernel, tiles, 2, axis)
    if not axis:
        y = _product(x.reshape(len(x), -1), kernel, tiles)
        return y.reshape(tiles.shape[-1], *x.shape[1:])
    *batch, inputs = x.shape
    y = _product(x.reshape(math.prod(batch), inputs).T, kernel, tiles).T
    return y.reshape(*batch, tiles.shape[-1])


def along(bias: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """A vector to be added along an axis, -1 or 0."""
    return bias if axis else bias.reshape(-1, *(1,) * (y.ndim - 1))


_LAYOUT = {-1: "(..., inputs)", 0: "(inputs, ...)"}


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
    _check_examples(x, kernel)
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
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:-1], window, steps, padding)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = zip(x.shape[1:-1], window, steps, strict=True)
    out = [(n - width) // step + 1 for n, width, step in sizes]
    columns, active = tiles.index.shape
    by_place = kernel.reshape(columns, active, math.prod(window), *tiles.tile)
    y: Any = 0
    for i, at in enumerate(itertools.product(*map(range, window))):
        stop = [a + (n - 1) * step + 1 for a, n, step in zip(at, out, steps, strict=True)]
        seen = lax.slice(x, (0, *at, 0), (len(x), *stop, x.shape[-1]), (1, *steps, 1))
        part = by_place[:, :, i].reshape(columns, -1, tiles.tile[1])
        y += _product(seen.reshape(-1, x.shape[-1]).T, part, tiles).T
    return y.reshape(len(x), *out, tiles.shape[-1])


def _product(x: jax.Array, kernel: jax.Array, tiles: Tiles) -> jax.Array:
    """kernel.T @ x for one place of the kernel; x of shape (inputs, examples)."""
    dtype = jnp.result_type(x, kernel)
    arrays = x.astype(dtype), kernel.astype(dtype), tiles.index
    if tiles.active is None:
        return _multiplied(tiles.rows, *_varying_alike(*arrays))
    return _beside_candidates(tiles.rows, *_varying_alike(*arrays, tiles.active))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiplied(rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """kernel.T @ x, examples last."""
    on_cpu, default = (functools.partial(form, rows) for form in (_forward_on_cpu, _forward))
    return lax.platform_dependent(x, kernel, index, cpu=on_cpu, default=default)


def _kept(rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
    return _multiplied(rows, x, kernel, index), (x, kernel, index)


def _gradients(rows: int, kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    on_cpu, default = (functools.partial(form, rows) for form in (_backward_on_cpu, _backward))
    return *lax.platform_dependent(grad, *kept, cpu=on_cpu, default=default), None


_multiplied.defvjp(_kept, _gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _beside_candidates(
    rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array, active: jax.Array
) -> jax.Array:
    """As `_multiplied`, where all but the active tiles are zero: their gradients alone matter."""
    return _multiplied(rows, x, *_active(kernel, index, active))


def _active(kernel: jax.Array, index: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    tiles = kernel.reshape(*index.shape, -1, kernel.shape[-1])
    found = jnp.take_along_axis(tiles, active[..., None, None], axis=1)
    rectangle = found.reshape(len(kernel), -1, kernel.shape[-1])
    return rectangle, jnp.take_along_axis(index, active, axis=1)


def _kept_beside(rows: int, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    return _beside_candidates(rows, *arrays), arrays


def _gradients_beside(rows: int, kept: Any, grad: jax.Array) -> tuple[Any, ...]:
    x, *at = kept
    of_x, *_ = _gradients(rows, (x, *_active(*at)), grad)
    _, of_kernel, _ = _gradients(rows, kept[:3], grad)
    return of_x, of_kernel, None, None


_beside_candidates.defvjp(_kept_beside, _gradients_beside)


def _forward(rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    y = jnp.einsum("cio,cie->coe", kernel, _seen(rows, x, kernel, index))
    return y.reshape(-1, x.shape[-1])


def _seen(rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    """What each column of tiles reads: (columns, inputs of its matrix, examples)."""
    examples = x.shape[-1]
    return x.reshape(rows, -1, examples)[index].reshape(*kernel.shape[:2], examples)


def _by_column(
    rows: int, grad: jax.Array, x: jax.Array, kernel: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of what each column reads, (columns, active, tile[0], examples), and of kernel."""
    by_column = grad.reshape(*kernel.shape[::2], x.shape[-1])
    of_kernel = jnp.einsum("coe,cie->cio", by_column, _seen(rows, x, kernel, index))
    of_seen = jnp.einsum("cio,coe->cie", kernel, by_column)
    return of_seen.reshape(*index.shape, -1, x.shape[-1]), of_kernel


def _backward(
    rows: int, grad: jax.Array, x: jax.Array, kernel: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and kernel."""
    of_tiles, of_kernel = _by_column(rows, grad, x, kernel, index)
    # Added up by a product with ones and zeros: GPUs make a slow loop of a scatter.
    ones = (index[..., None] == jnp.arange(rows, dtype=index.dtype)).astype(x.dtype)
    of_x = jnp.einsum("cfr,cfie->rie", ones, of_tiles, precision=lax.Precision.HIGHEST)
    return of_x.reshape(x.shape), of_kernel


# On a CPU, columns are taken in groups that gather about so many bytes, which stay in a core's
# cache until they are multiplied: in a loop, or without one where groups are few, so that several
# cores can work on them.
GATHERED = 3 << 19
UNROLLED = 4


@functools.partial(jax.jit, static_argnums=0, inline=True)  # not compiled again where not in a jit
def _forward_on_cpu(rows: int, x: jax.Array, kernel: jax.Array, index: jax.Array) -> jax.Array:
    def one(_: None, group: Any) -> tuple[None, jax.Array]:
        turned, index = group
        seen = _seen(rows, x, turned.swapaxes(1, 2), index)
        return None, jnp.einsum("coi,cie->coe", turned, seen)

    # Turned once, not within each product.
    turned = lax.optimization_barrier(kernel.swapaxes(1, 2))
    _, y = _over_groups(_at_once(x, kernel), one, None, turned, index)
    return y.reshape(-1, x.shape[-1])


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _backward_on_cpu(
    rows: int, grad: jax.Array, x: jax.Array, kernel: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def one(of_x: jax.Array, group: Any) -> tuple[jax.Array, jax.Array]:
        kernel, index, grad = group
        of_tiles, of_kernel = _by_column(rows, grad, x, kernel, index)
        return of_x.at[index].add(of_tiles), of_kernel

    (start,) = _varying_alike(jnp.zeros_like(x), like=x)
    start = start.reshape(rows, -1, x.shape[-1])
    by_column = kernel, index, grad.reshape(len(kernel), -1, x.shape[-1])
    of_x, of_kernel = _over_groups(_at_once(x, kernel), one, start, *by_column)
    return of_x.reshape(x.shape), of_kernel


def _at_once(x: jax.Array, kernel: jax.Array) -> int:
    """How many columns of a kernel gather at most GATHERED bytes, in equal groups; at least one."""
    columns, inputs, _ = kernel.shape
    most = max(GATHERED // (inputs * x.shape[-1] * x.dtype.itemsize), 1)
    return -(-columns // -(-columns // most))


def _over_groups(
    size: int, one: Callable[..., Any], start: Any, *by_column: jax.Array
) -> tuple[Any, jax.Array]:
    """`lax.scan` of `one` over so many columns at a time, and then those that are left."""
    whole = len(by_column[0]) // size * size
    groups = [a[:whole].reshape(-1, size, *a.shape[1:]) for a in by_column]
    carry, of_groups = lax.scan(one, start, groups, unroll=whole // size <= UNROLLED)
    found = of_groups.reshape(whole, *of_groups.shape[2:])
    if whole == len(by_column[0]):
        return carry, found
    carry, left = one(carry, [a[whole:] for a in by_column])
    return carry, jnp.concatenate([found, left])


def _varying_alike(*arrays: jax.Array, like: Any = None) -> list[jax.Array]:
    """In `shard_map`: arrays that may all differ over the same mesh axes, as their types say."""
    axes = set[str]().union(*map(varying_axes, arrays if like is None else (*arrays, like)))
    more = [tuple(sorted(axes - varying_axes(x))) for x in arrays]
    return [lax.pcast(x, m, to="varying") if m else x for x, m in zip(arrays, more, strict=True)]


def _check_examples(x: jax.Array, kernel: jax.Array) -> None:
    if 0 in x.shape:
        raise ValueError(
            f"x of shape {x.shape} has no examples for a kernel of shape {kernel.shape}: leave an "
            "empty batch out."
        )


def _check(x: jax.Array, kernel: jax.Array, tiles: Tiles, ndim: int, axis: int = -1) -> None:
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
    if x.ndim < ndim - 1 or x.shape[axis] != tiles.shape[-2]:
        where = "last" if axis else "first"
        raise ValueError(
            f"x has shape {x.shape}, where a kernel of shape {tiles.shape} needs "
            f"{tiles.shape[-2]} on the {where} axis" + (f" of {ndim}." if ndim > 2 else ".")
        )
