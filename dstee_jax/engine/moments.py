"""What an inner optimizer keeps: which arrays belong to which parameter, and what a mask step does.

Nothing here knows an optimizer. Which leaf of the inner state has one value for each weight of a
parameter is asked of `inner.init` by shapes: where the parameter's shape changes, the leaf's does.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dstee_jax.trees import PyTree, expanded, is_dense, leaves_with_path, path_name

Shape = tuple[int, ...]
# A parameter's index; 'all' for one vector of all parameters in a row; None for neither.
Owner = int | Literal["all"] | None


def owners(inner: optax.GradientTransformation, params: PyTree) -> list[Owner]:
    """For each leaf of `inner.init(params)`: which parameter it has one value for each weight of.

    Args:
      inner: the optimizer.
      params: arrays or shapes.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    kept = _leaves(inner, params, shapes)
    answers: list[set[Owner]] = [set() for _ in kept]
    for probe in _probes(shapes):
        seen = _leaves(inner, params, probe)
        if len(seen) != len(kept):
            continue  # an optimizer that treats leaves by their size
        places: dict[Any, Owner] = {p: i for i, p in enumerate(zip(shapes, probe, strict=True))}
        flat = ((_total(shapes),), (_total(probe),))
        for answer, leaf, changed in zip(answers, kept, seen, strict=True):
            pair = (leaf.shape, changed.shape)
            each = leaf.ndim and is_float(leaf)
            answer.add(places.get(pair, "all" if pair == flat else None) if each else None)
    # Two answers: a row of statistics has been as long as a bias by chance.
    found = [answer.pop() if len(answer) == 1 else None for answer in answers]
    return found


def memories(inner: optax.GradientTransformation, params: PyTree) -> list[str]:
    """Names of leaves of the inner state that keep several values for each weight of a parameter.

    Floating leaves with more axes before the parameter's own, as the memories of `optax.lbfgs`.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    probe = _probes(shapes)[0]
    pairs = {(a, b) for a, b in zip(shapes, probe, strict=True) if a}
    kept, seen = _leaves(inner, params, shapes), _leaves(inner, params, probe)
    if len(kept) != len(seen):
        return []

    def several(leaf: Any, changed: Any) -> bool:
        below = [(leaf.shape[i:], changed.shape[i:]) for i in range(1, leaf.ndim)]
        return is_float(leaf) and any(pair in pairs for pair in below)

    rows = zip(_names(inner, params), kept, seen, owners(inner, params), strict=True)
    return [name for name, *leaf, owner in rows if owner is None and several(*leaf)]


def unmatched_state(inner: optax.GradientTransformation, params: PyTree) -> list[str]:
    """Names of arrays in an optimizer's state that have no entry for each weight of a parameter.

    Floating arrays of more than one entry whose shape follows the parameters', as the row and
    column means of `optax.adafactor`. A mask step leaves them as they are; all others, of a
    weight that it drops or grows, start again as `inner.init` has them. `dstee.transform` warns
    of what this returns.

    Args:
      inner: the optimizer, as given to `dstee.transform`.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      Paths through the state of `inner`, in its order.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> unmatched_state(optax.adam(0.1), {"kernel": jnp.ones((256, 128))})
      []
      >>> names = unmatched_state(optax.adafactor(0.1), {"kernel": jnp.ones((256, 128))})
      >>> [name.split("/")[-2:] for name in names]
      [['v_row', 'kernel'], ['v_col', 'kernel']]
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    kept = _leaves(inner, params, shapes)
    wider = [tuple(size + 1 for size in shape) for shape in shapes]  # follows any axis
    probes = [_leaves(inner, params, probe) for probe in (*_probes(shapes), wider)]

    def follows(j: int) -> bool:
        return any(len(p) != len(kept) or p[j].shape != kept[j].shape for p in probes)

    rows = zip(_names(inner, params), kept, owners(inner, params), strict=True)
    return [
        name
        for j, (name, leaf, owner) in enumerate(rows)
        if owner is None and leaf.size > 1 and is_float(leaf) and follows(j)
    ]


def restarted(
    inner: optax.GradientTransformation, state: PyTree, params: PyTree, changed: Sequence[Any]
) -> PyTree:
    """The inner state with what it keeps of some weights as `inner.init` has it.

    Args:
      inner: the optimizer.
      state: its state.
      params: what the initial values are made for.
      changed: for each parameter a bool array, True where the state starts again, or a
        `MaskedNode`.
    """
    leaves, treedef = jax.tree.flatten(state)

    def one(owner: Owner, leaf: jax.Array, initial: jax.Array) -> jax.Array:
        if owner == "all":
            pairs = zip(changed, jax.tree.leaves(params), strict=True)
            rows = [
                jnp.zeros(jnp.size(p), bool) if is_dense(c) else expanded(c, jnp.shape(p)).ravel()
                for c, p in pairs
            ]
            return jnp.where(jnp.concatenate(rows), initial, leaf)
        if owner is None or is_dense(changed[owner]):
            return leaf
        return jnp.where(expanded(changed[owner], leaf.shape), initial.astype(leaf.dtype), leaf)

    rows = zip(owners(inner, params), leaves, jax.tree.leaves(inner.init(params)), strict=True)
    return jax.tree.unflatten(treedef, [one(*row) for row in rows])


def _leaves(
    inner: optax.GradientTransformation, params: PyTree, shapes: Sequence[Shape]
) -> list[jax.ShapeDtypeStruct]:
    """The leaves of the inner state if the parameters had these shapes."""
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, shapes, strict=True)
    structs = [jax.ShapeDtypeStruct(shape, jnp.result_type(x)) for x, shape in pairs]
    return jax.tree.leaves(jax.eval_shape(inner.init, jax.tree.unflatten(treedef, structs)))


def _names(inner: optax.GradientTransformation, params: PyTree) -> list[str]:
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    pairs = leaves_with_path(jax.eval_shape(inner.init, structs))
    return [path_name(path) for path, leaf in pairs if not is_dense(leaf)]


def _probes(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Shapes with the longest axis of each changed, of equal lengths each by another number.

    Once shorter and once longer: an optimizer may treat leaves of some sizes in another way.
    """
    return [_changed(shapes, -1), _changed(shapes, 1)]


def _changed(shapes: Sequence[Shape], sign: int) -> list[Shape]:
    found: list[Shape] = []
    alike: collections.Counter[int] = collections.Counter()
    for shape in shapes:
        alike[max(shape, default=0)] += 1
        by = alike[max(shape, default=0)]
        axis = max(range(len(shape)), key=lambda i: shape[i], default=None)
        if axis is None:
            found.append(shape)
            continue
        size = shape[axis] + sign * by
        size = size if size > 0 else shape[axis] + by
        found.append((*shape[:axis], size, *shape[axis + 1 :]))
    return found


def _total(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def is_float(leaf: Any) -> bool:
    """Whether an array of an optimizer's state has fractions: no count, no key."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
