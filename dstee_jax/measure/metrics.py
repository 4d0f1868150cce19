"""Metrics of a sparse network: density, exploration and exploitation degree, a table by leaf."""

import math
import textwrap
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from dstee_jax.rules.units import input_axes, output_units
from dstee_jax.state import SparseState, get_state
from dstee_jax.trees import PyTree, expanded, is_dense, leaves_with_path, mask_leaves, path_name


def _state(opt_state: PyTree) -> SparseState:
    return opt_state if isinstance(opt_state, SparseState) else get_state(opt_state)


def _share(state: SparseState, arrays: list[jax.Array]) -> jax.Array:
    """The share of weights where arrays, one for each mask, are True."""
    pairs = list(zip(arrays, _sizes(state), strict=True))
    hits = sum(jnp.sum(x, dtype=jnp.float32) * size for x, size in pairs)
    weights = jnp.asarray(sum(x.size * size for x, size in pairs), jnp.float32)
    return jnp.asarray(hits / jnp.maximum(weights, 1), jnp.float32)


def _sizes(state: SparseState) -> list[Any]:
    """How many weights an entry of each mask stands for."""
    sizes = [size.astype(jnp.float32) for size in jax.tree.leaves(state.tile_sizes)]
    return sizes or [1] * len(jax.tree.leaves(state.masks))


def density(opt_state: PyTree) -> jax.Array:
    """Share of active weights among all weights of the sparse leaves; float32, shape ().

    Args:
      opt_state: a `SparseState`, or an optax state with one in it.
    """
    state = _state(opt_state)
    return _share(state, jax.tree.leaves(state.masks))


def exploration_degree(opt_state: PyTree) -> jax.Array:
    """The paper's R: share of weights that have been active at least once; float32, shape ().

    Read off the counters, so the first mask counts only with `counter_init='masks'` (the
    default). Over all leaves that `where` selects; those that ERK keeps dense are explored.

    Args:
      opt_state: a `SparseState`, or an optax state with one in it.

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, R in "Weights Coverage
      Exploration in Sparse Training".
    """
    state = _state(opt_state)
    return _share(state, [counter > 0 for counter in jax.tree.leaves(state.counters)])


def exploitation_degree(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, grown: PyTree
) -> jax.Array:
    """Eq. 3: how much the loss falls by the weights that a round has grown.

    L(W) - L(W + W_grown). A grown weight starts at zero, so take its value after the next
    optimizer step.

    Args:
      loss_fn: params -> scalar loss.
      params: W, where the grown weights are zero.
      grown: the structure of params: the values of the grown weights, zero elsewhere.

    Returns:
      The decrease of the loss, shape (); positive if growing helped.

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Eq. 3.
    """
    return loss_fn(params) - loss_fn(jax.tree.map(jnp.add, params, grown))


def empty_units(mask: jax.Array, *, output_axis: int = -1) -> jax.Array:
    """Number of output units without any active weight; int32, shape ().

    Such a unit computes a constant. Growth by gradient, which fills few units, and dropping by
    magnitude can empty many; `structures.constant_fan_in()` keeps all of them fed.

    Args:
      mask: bool array.
      output_axis: of the units: -1 for kernels (..., inputs, outputs), as Flax has them, 0 for
        (outputs, inputs, ...), as Equinox and PyTorch have them.
    """
    return jnp.sum(~jnp.any(mask, axis=input_axes(mask.shape, output_axis)), dtype=jnp.int32)


def summary(opt_state: PyTree, params: PyTree = None, *, output_axis: int = -1) -> str:
    """A table by leaf, and what stays dense.

    The columns are shape, weights, active, explored, empty output units, and the leaf's share of
    all active weights. Below the total of the sparse leaves come the leaves that stay dense:
    with `params` those of 2 dimensions and more and the others together, and the density of the
    whole network; without, since the state does not know their shapes, their names. Of tiles,
    the shape without `params` is that of their mask, and units are columns of tiles.

    Args:
      opt_state: a `SparseState`, or an optax state with one in it; concrete, not traced.
      params: the parameters that the state belongs to, or their shapes.
      output_axis: of the units, as for `empty_units`.

    Returns:
      Text of several lines, to print.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}
      >>> tx = dstee.transform(optax.sgd(0.1), sparsity=0.9, total_steps=200, key=jax.random.key(0))
      >>> print(summary(tx.init(params), params).splitlines()[-1].split())
      ['network', '210', '30', '(', '14.3%)']
    """
    state = _state(opt_state)
    masks = leaves_with_path(state.masks)
    counters = [counter for _, counter in leaves_with_path(state.counters)]
    rows: list[_Row] = []
    shapes = {} if params is None else dict(_shapes(params))
    sizes = iter(map(int, _sizes(state)))
    for (path, mask), counter in zip(masks, counters, strict=True):
        if not is_dense(mask):
            size = next(sizes)
            if path_name(path) in shapes:
                full, size = shapes[path_name(path)], 1
                mask, counter = expanded(mask, full), expanded(counter, full)
            numbers = [int(n) * size for n in (mask.size, mask.sum(), (counter > 0).sum())]
            numbers.append(int(empty_units(mask, output_axis=output_axis)))
            numbers.append(output_units(mask.shape, output_axis))
            rows.append((path_name(path), _times(mask.shape), numbers))
    total = [sum(numbers[i] for *_, numbers in rows) for i in range(5)]
    rows.append(("total", "", total))
    dense = [] if params is None else _dense_rows(state.masks, params)
    width = max(len("leaf"), *(len(name) for name, *_ in rows + dense))
    across = max(len("shape"), *(len(shape) for _, shape, _ in rows + dense))
    head = f"{'leaf':<{width}}  {'shape':>{across}} {'weights':>12} {'active':>20} {'explored':>20}"
    lines = [f"{head} {'empty units':>13} {'share':>7}"]
    for name, shape, (weights, active, explored, empty, units) in rows:
        lines.append(
            f"{name:<{width}}  {shape:>{across}} {weights:>12,} {_part(active, weights)} "
            f"{_part(explored, weights)} {f'{empty:,}/{units:,}':>13} "
            f"{active / max(total[1], 1):>7.1%}"
        )
    if params is None:
        names = ", ".join(path_name(path) for path, mask in masks if is_dense(mask))
        return "\n".join([*lines, *textwrap.wrap(names and f"dense: {names}", 100)])
    whole = [sum(numbers[i] for *_, numbers in [rows[-1], *dense]) for i in (0, 1)]
    for name, shape, (weights, active) in [*dense, ("network", "", whole)]:
        lines.append(f"{name:<{width}}  {shape:>{across}} {weights:>12,} {_part(active, weights)}")
    return "\n".join(lines)


_Row: TypeAlias = tuple[str, str, list[int]]  # name, shape, numbers


def _dense_rows(masks: PyTree, params: PyTree) -> list[_Row]:
    """The leaves that stay dense, with as many active as weights; vectors and scalars in one."""
    given = zip(_shapes(params), mask_leaves(masks, params), strict=True)
    leaves = [pair for pair, mask in given if is_dense(mask)]
    rows = [(name, _times(s), [math.prod(s)] * 2) for name, s in leaves if len(s) > 1]
    sizes = [math.prod(shape) for _, shape in leaves if len(shape) < 2]
    if sizes:
        rows.append((f"{len(sizes)} vectors and scalars", "", [sum(sizes)] * 2))
    return [(f"dense: {name}", shape, numbers) for name, shape, numbers in rows]


def _shapes(params: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    pairs = [(path, leaf) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    return [(path_name(path), jnp.shape(leaf)) for path, leaf in pairs]


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _part(count: int, whole: int) -> str:
    return f"{count:>11,} ({count / max(whole, 1):>6.1%})"
