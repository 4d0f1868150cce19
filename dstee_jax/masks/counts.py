"""Counts: how many weights of each leaf, or of each part of it, are active; from shapes alone."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.masks import distributions
from dstee_jax.masks.distributions import Distribution
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.parts import Grid, cut_axes, inner_axes
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name

Where = Callable[[Any, Any], bool]
Sparsity = float | Mapping[str, float]
# An integer, or an array of them with an axis for each axis of the leaf that is cut into parts.
Count: TypeAlias = int | np.ndarray
StackAxes = Callable[[Any, Any], Sequence[int]]
Blocks = Callable[[Any, Any], Sequence[int]]

MAX_SIZE = 2**32 - 1  # entries of a part: counts and indices are uint32


class Layout:
    """How leaves are cut into parts: by stacked layers, and into blocks.

    Attributes:
      stacks: for each leaf, the axes that stack layers.
    """

    def __init__(self, params: PyTree, stack_axes: StackAxes | None, blocks: Blocks | None):
        leaves = [(path, leaf) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
        self.leaves = leaves
        self.stacks = [() if stack_axes is None else _axes(stack_axes, *row) for row in leaves]
        self.blocks = blocks

    def grid(self, i: int) -> Grid:
        """How many parts each axis of the i-th leaf has; asked of sparse leaves alone."""
        path, leaf = self.leaves[i]
        blocks = None if self.blocks is None else self.blocks(path, leaf)
        return _grid(path, jnp.shape(leaf), self.stacks[i], blocks)

    def unstacked(self, i: int) -> Any:
        """The i-th leaf, or the shape of one of its layers."""
        leaf, axes = self.leaves[i][1], self.stacks[i]
        if not axes:
            return leaf
        shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in axes)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def layers(self, i: int) -> list[str]:
        """The names of the i-th leaf's layers, as 'kernel[0]'; its own name if not stacked."""
        path, leaf = self.leaves[i]
        sizes = [range(leaf.shape[axis]) for axis in self.stacks[i]]
        return [path_name(path) + "".join(f"[{j}]" for j in at) for at in itertools.product(*sizes)]

    def share(self, i: int, by_layer: list[int]) -> Count:
        """Counts of the i-th leaf's parts from those of its layers."""
        shape, grid, stack = self.leaves[i][1].shape, self.grid(i), self.stacks[i]
        cut = cut_axes(grid)
        if not cut:
            return by_layer[0]
        sizes = [shape[axis] if axis in stack else 1 for axis in cut]
        blocks = math.prod(grid[axis] for axis in cut if axis not in stack)
        each = np.array([max(round(n / blocks), 1) for n in by_layer]).reshape(sizes)
        return np.broadcast_to(each, [grid[axis] for axis in cut]).copy()

    def of_mask(self, i: int, mask: np.ndarray) -> Count:
        """Counts of the parts of a concrete mask."""
        grid = self.grid(i)
        if math.prod(grid) == 1:
            return int(mask.sum())
        halves = [[p, n // p] if p > 1 else [n] for n, p in zip(mask.shape, grid, strict=True)]
        return mask.reshape([n for half in halves for n in half]).sum(inner_axes(mask.shape, grid))


def _axes(stack_axes: StackAxes, path: Any, leaf: Any) -> tuple[int, ...]:
    given = stack_axes(path, leaf)
    axes = (given,) if isinstance(given, int) else tuple(given)
    ndim = jnp.ndim(leaf)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"stack_axes gives {axes} for {path_name(path)} of shape {jnp.shape(leaf)}: return "
            f"axes in [0, {ndim}), or () for a leaf that is one layer."
        )
    return tuple(sorted({axis % ndim for axis in axes}))


def _grid(path: Any, shape: tuple[int, ...], stack: Sequence[int], blocks: Any) -> Grid:
    grid = (1,) * len(shape) if blocks is None else tuple(blocks)
    fits = len(grid) == len(shape) and all(
        isinstance(parts, int | np.integer) and parts >= 1 and n % parts == 0
        for n, parts in zip(shape, grid, strict=True)
    )
    if not fits:
        raise ValueError(
            f"blocks gives {grid} for {path_name(path)} of shape {shape}: return how many equal "
            "parts each axis has, 1 for one that is not cut."
        )
    parts = tuple(shape[axis] if axis in stack else n for axis, n in enumerate(grid))
    size = math.prod(shape) // math.prod(parts) if math.prod(shape) else 0
    if size > MAX_SIZE:
        raise ValueError(
            f"{path_name(path)} of shape {shape} has {size:,} entries in a part, more than "
            f"{MAX_SIZE:,}: cut it up with blocks=, or with stack_axes= if it stacks layers."
        )
    return parts


def leaf_counts(
    params: PyTree,
    sparsity: Sparsity,
    distribution: Distribution,
    where: Where,
    structure: Structure | None = None,
    layout: Layout | None = None,
) -> list[Count | None]:
    """Exact active count of each leaf of `params` in leaf order, None where it stays dense.

    The distribution sees each layer of a stacked leaf as a leaf of its own.

    Raises:
      ValueError: `where` selects no leaf, or the sparsity is impossible.
    """
    layout = layout or Layout(params, None, None)
    paths = [path for path, _ in layout.leaves]
    chosen = [i for i, path in enumerate(paths) if where(path, layout.unstacked(i))]
    layers = {i: layout.layers(i) for i in chosen}
    shapes = {name: tuple(layout.unstacked(i).shape) for i in chosen for name in layers[i]}
    if paths and not shapes:
        raise ValueError(
            "where selects none of the leaves "
            f"{[path_name(path) for path in paths]}: pass where=lambda path, leaf: ... that "
            "is True for at least one."
        )
    if len(shapes) != sum(map(len, layers.values())):
        names = [path_name(path) for path in paths]
        raise ValueError(f"two leaves have the same name among {names}: rename one.")
    if isinstance(sparsity, Mapping):
        of_leaf = {path_name(paths[i]): layers[i] for i in chosen}
        sparsity = {
            layer: value for name, value in sparsity.items() for layer in of_leaf.get(name, [name])
        }
    counts = distributions.active_counts(shapes, sparsity, distribution)
    if structure is not None:
        whole = not isinstance(sparsity, Mapping)
        counts = _of_structure(counts, shapes, list(layers.values()), structure, whole)
    result: list[Count | None] = [None] * len(paths)
    for i in chosen:
        result[i] = layout.share(i, [counts[name] for name in layers[i]])
    return result


def _of_structure(
    wanted: dict[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    leaves: list[list[str]],
    structure: Structure,
    whole: bool,
) -> dict[str, int]:
    """Counts that a structure allows: the nearest of each layer, all layers of a leaf alike.

    If the sparsity is of the whole network, leaves then move by a step of the structure, at most
    one each, as long as that brings the total nearer to what is wanted.
    """
    counts = {}
    for name, n in wanted.items():
        try:
            counts[name] = structure.count(shapes[name], n)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    over = sum(counts.values()) - sum(wanted.values())
    left = {}
    if whole and structure.step is not None:
        left = {i: structure.step(shapes[names[0]]) for i, names in enumerate(leaves) if names}
    while over and left:
        sign = -1 if over > 0 else 1
        moved = {i: over + sign * step * len(leaves[i]) for i, step in left.items()}
        best = min(moved, key=lambda i: abs(moved[i]))
        if abs(moved[best]) >= abs(over):
            break
        step, names = left.pop(best), leaves[best]
        size = math.prod(shapes[names[0]])
        if all(step <= counts[name] + sign * step <= size for name in names):
            counts.update({name: counts[name] + sign * step for name in names})
            over = moved[best]
    return counts


def total(count: Count | None) -> int:
    """Active weights of a whole leaf, 0 for a dense one."""
    return 0 if count is None else int(np.sum(count))


def equal(count: Count) -> int | None:
    """The count of every part, None if they differ."""
    values = np.unique(count)
    return int(values[0]) if values.size == 1 else None


class LeafSpec(NamedTuple):
    """What is known of a sparse leaf from shapes."""

    target: Count  # active weights at the asked sparsity, of each part
    start: Count  # the same at step 0
    grid: Grid  # how many parts each axis has
    stack: tuple[int, ...]  # axes that stack layers

    def of_layer(self, shape: tuple[int, ...]) -> int | None:
        """Active weights of each layer of the leaf at the asked sparsity, None if they differ."""
        if equal(self.target) is None:
            return None
        return total(self.target) // math.prod(shape[axis] for axis in self.stack)


def check_parts(
    layout: Layout,
    specs: Sequence[LeafSpec | None],
    exchanges: bool,
    structure: Structure | None,
    indices: bool,
) -> None:
    """Raise a ValueError that names the leaf where parts and options do not go together."""
    for (path, leaf), spec in zip(layout.leaves, specs, strict=True):
        if spec is None:
            continue
        cut = cut_axes(spec.grid)
        placed = jax.typeof(leaf).sharding.spec if isinstance(leaf, jax.Array) else ()
        tiled = structure is not None and bool(structure.tile)
        if tiled and any(name is not None for name in placed):
            raise ValueError(
                f"{path_name(path)} is split over mesh axes {placed}, and tiles are of whole "
                "kernels: replicate it, or leave structure= out."
            )
        if indices and any(name is not None and i not in cut for i, name in enumerate(placed)):
            raise ValueError(
                f"{path_name(path)} is split over mesh axes {placed}: packed=True and indices=True "
                "then need blocks=dstee.blocks_of(params)."
            )
        if cut and not exchanges:
            raise ValueError(
                f"{path_name(path)} is cut into {spec.grid} parts, each of which keeps its count, "
                "which needs a plan that exchanges: leave stack_axes= and blocks= out, or plan=."
            )
        if structure is not None and set(cut) - set(spec.stack):
            raise ValueError(
                f"{path_name(path)} is cut into {spec.grid} blocks, which structure= does not "
                "respect: leave blocks= out."
            )
        if tiled and spec.stack != (*range(len(spec.stack)),):
            raise ValueError(
                f"{path_name(path)} stacks layers along axes {spec.stack}: with tiles they must be "
                "the first ones."
            )
        if indices and equal(spec.target) is None:
            raise ValueError(
                f"the layers or blocks of {path_name(path)} have {np.unique(spec.target)} active "
                f"weights: packed=True and indices=True need as many in each of {spec.grid}."
            )
