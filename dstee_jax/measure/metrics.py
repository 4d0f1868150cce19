"""Metrics of a sparse network: density, exploration and exploitation degree, a table by leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dstee_jax.state import SparseState, get_state
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name


def _state(opt_state: PyTree) -> SparseState:
    return opt_state if isinstance(opt_state, SparseState) else get_state(opt_state)


def _share(trees: list[jax.Array]) -> jax.Array:
    hits = sum(jnp.sum(x, dtype=jnp.float32) for x in trees)
    return jnp.asarray(hits / max(sum(x.size for x in trees), 1), jnp.float32)


def density(opt_state: PyTree) -> jax.Array:
    """Share of active weights among all weights of the sparse leaves; float32, shape ().

    Args:
      opt_state: a `SparseState`, or an optax state with one in it.
    """
    return _share(jax.tree.leaves(_state(opt_state).masks))


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
    return _share([counter > 0 for counter in jax.tree.leaves(_state(opt_state).counters)])


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


def empty_units(mask: jax.Array) -> jax.Array:
    """Number of output units (last axis) without any active weight; int32, shape ().

    Such a unit computes a constant. Growth by gradient, which fills few units, and dropping by
    magnitude can empty many; `structures.constant_fan_in()` keeps all of them fed.

    Args:
      mask: bool array of 1 dimension or more.
    """
    return jnp.sum(~jnp.any(mask, axis=tuple(range(mask.ndim - 1))), dtype=jnp.int32)


def summary(opt_state: PyTree) -> str:
    """A table by leaf: shape, weights, active, explored, empty output units, share of active.

    Args:
      opt_state: a `SparseState`, or an optax state with one in it; concrete, not traced.

    Returns:
      Text of several lines, to print.
    """
    state = _state(opt_state)
    masks = leaves_with_path(state.masks)
    counters = [counter for _, counter in leaves_with_path(state.counters)]
    rows: list[tuple[Any, ...]] = []
    total = [0, 0, 0, 0, 0]
    for (path, mask), counter in zip(masks, counters, strict=True):
        if is_dense(mask):
            continue
        numbers = [mask.size, int(mask.sum()), int((counter > 0).sum())]
        numbers += [int(empty_units(mask)), mask.shape[-1] if mask.ndim else 1]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        rows.append((path_name(path), "×".join(map(str, mask.shape)), *numbers))
    rows.append(("total", "", *total))
    width = max(len("leaf"), *(len(row[0]) for row in rows))
    across = max(len("shape"), *(len(row[1]) for row in rows))
    head = f"{'leaf':<{width}}  {'shape':>{across}} {'weights':>12} {'active':>20} {'explored':>20}"
    lines = [f"{head} {'empty units':>13} {'share':>7}"]
    for name, shape, weights, active, explored, empty, units in rows:
        lines.append(
            f"{name:<{width}}  {shape:>{across}} {weights:>12,} {_part(active, weights)} "
            f"{_part(explored, weights)} {f'{empty:,}/{units:,}':>13} "
            f"{active / max(total[1], 1):>7.1%}"
        )
    return "\n".join(lines)


def _part(count: int, whole: int) -> str:
    return f"{count:>11,} ({count / max(whole, 1):>6.1%})"
