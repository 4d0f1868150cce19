"""What an inner optimizer keeps of inactive weights: its initial value, whatever the optimizer.

A leaf of the inner state belongs to a parameter if it has the parameter's shape and its key
path ends in the parameter's key path (the longest one wins). This needs no list of optimizer
states: it holds for momentum, Adam's moments, Muon's partition, schedule-free's z, ...
Statistics of another shape (Adafactor's row and column means) have no entry per weight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_parts


def owners(state: PyTree, params: PyTree) -> list[int | None]:
    """For each leaf of an optimizer state: the index of the parameter it belongs to, or None.

    Args:
      state: an optax state (arrays or shapes).
      params: the parameters it was made for.
    """
    leaves = _arrays(params)
    index = {path_parts(path): i for i, (path, _) in enumerate(leaves)}

    def owner(path: Any, leaf: Any) -> int | None:
        for start in range(len(path) + 1):
            i = index.get(path_parts(path)[start:])
            if i is not None and _alike(leaves[i][1], leaf):
                return i
        return None

    return [owner(path, leaf) for path, leaf in _arrays(state)]


def _arrays(tree: PyTree) -> list[tuple[Any, Any]]:
    return [(path, leaf) for path, leaf in leaves_with_path(tree) if not is_dense(leaf)]


def _alike(param: Any, leaf: Any) -> bool:
    """Equal shapes, and both numbers with a fraction or neither (a step count is no moment)."""
    inexact = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (param, leaf)]
    return jnp.shape(param) == jnp.shape(leaf) and inexact[0] == inexact[1]


def merge(
    new: PyTree, old: PyTree, initial: PyTree, params: PyTree, pick: Callable[..., jax.Array]
) -> PyTree:
    """Put an inner state together, leaf by leaf.

    Args:
      new: the state that `inner.update` returned; leaves that belong to no parameter (step
        counts, schedules' steps, keys) are taken from here.
      old: the state before it.
      initial: `inner.init(params)`.
      params: the parameters.
      pick: `pick(i, new, old, initial)`, the array for a leaf of the i-th parameter.
    """
    leaves, treedef = jax.tree.flatten(new)
    rows = zip(
        owners(new, params), leaves, jax.tree.leaves(old), jax.tree.leaves(initial), strict=True
    )
    merged = [n if i is None else pick(i, n, o, z) for i, n, o, z in rows]
    return jax.tree.unflatten(treedef, merged)
