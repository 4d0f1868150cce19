"""Parts: a leaf cut into equal boxes, each of which keeps its own count of active weights.

A grid says into how many parts each axis is cut: (12, 1, 1) for twelve stacked layers, (4, 2)
for a matrix that lies on 4 x 2 devices, all ones for a leaf that is one part. What is done part
by part stays on the device that holds the part. Works under Auto and Explicit mesh axes.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Grid = tuple[int, ...]


def is_sharded(x: jax.Array) -> bool:
    """Whether the type of x says that it is split over Explicit mesh axes."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def sharding_of(x: jax.Array) -> NamedSharding | None:
    """How new arrays of x's shape must lie to be combined with it; None where XLA decides."""
    return jax.typeof(x).sharding if is_sharded(x) else None


def whole(x: jax.Array) -> jax.Array:
    """x with all of it on every device of its Explicit mesh axes; as it is under Auto axes."""
    if not is_sharded(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P()))


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undo `whole`: x over the Explicit mesh axes that `like`, of its shape, is split over."""
    return jax.sharding.reshard(x, jax.typeof(like).sharding) if is_sharded(like) else x


def varying_axes(x: jax.Array) -> set[str]:
    """The manual mesh axes over whose devices x may differ, as its type says."""
    return set(jax.typeof(x).manual_axis_type.varying)


def cut_axes(grid: Grid) -> list[int]:
    """Axes with more than one part."""
    return [axis for axis, parts in enumerate(grid) if parts > 1]


def inner_axes(shape: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    """Axes of `split(x, grid)` that lie within a part; the others count the parts."""
    sizes = [
        [parts, n // parts] if parts > 1 else [n] for n, parts in zip(shape, grid, strict=True)
    ]
    ends = list(itertools.accumulate(len(s) for s in sizes))
    return tuple(end - 1 for end in ends)


def split(x: jax.Array, grid: Grid) -> jax.Array:
    """Cut each axis of more than one part in two: which part, and where in it."""
    if math.prod(grid) == 1:
        return x
    shape: list[int] = []
    spec: list = []
    for n, parts, name in zip(x.shape, grid, jax.typeof(x).sharding.spec, strict=True):
        shape += [parts, n // parts] if parts > 1 else [n]
        spec += [name, None] if parts > 1 else [name]
    return _reshape(x, tuple(shape), spec)


def join(x: jax.Array, shape: tuple[int, ...], grid: Grid) -> jax.Array:
    """Undo `split`: an array of `shape`."""
    if math.prod(grid) == 1:
        return x
    inner = inner_axes(shape, grid)
    names = jax.typeof(x).sharding.spec
    spec = [names[i - 1] if parts > 1 else names[i] for i, parts in zip(inner, grid, strict=True)]
    return _reshape(x, shape, spec)


def by_part(value: jax.Array, cut: jax.Array, inner: tuple[int, ...]) -> jax.Array:
    """A value for each part, laid on devices as the parts of `cut` are; other axes come first."""
    if not value.ndim or not is_sharded(cut):
        return value
    place = jax.typeof(cut).sharding
    names = [name for axis, name in enumerate(place.spec) if axis not in inner]
    first = [None] * (value.ndim - len(names))
    return jax.sharding.reshard(value, NamedSharding(place.mesh, P(*first, *names)))


def flatten(x: jax.Array, grid: Grid) -> jax.Array:
    """The entries of each part in row-major order: (parts of each cut axis ..., entries)."""
    inner = inner_axes(x.shape, grid)
    cut = split(x, grid)
    outer = [axis for axis in range(cut.ndim) if axis not in inner]
    moved = cut.transpose(*outer, *inner)
    return moved.reshape(*moved.shape[: len(outer)], math.prod(moved.shape[len(outer) :]))


def unflatten(x: jax.Array, shape: tuple[int, ...], grid: Grid) -> jax.Array:
    """Undo `flatten`: an array of `shape`."""
    inner = inner_axes(shape, grid)
    ndim = len(shape) + len(cut_axes(grid))
    outer = [axis for axis in range(ndim) if axis not in inner]
    within = [n // parts for n, parts in zip(shape, grid, strict=True)]
    back = sorted(range(ndim), key=[*outer, *inner].__getitem__)
    return join(x.reshape(*x.shape[:-1], *within).transpose(back), shape, grid)


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: list) -> jax.Array:
    if not is_sharded(x):
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, P(*spec)))
