"""After the masks are known: what a step emits, and what the inner optimizer keeps.

Alive is a weight that is active before and after the step. Where it is not, the update is
-weight, so that the parameter becomes exactly zero, and the moments are their initial values.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dstee_jax.moments import merge
from dstee_jax.packed import SparseUpdate, positions, put, take
from dstee_jax.state import is_dense


class Inner(NamedTuple):
    """The inner optimizer and its state before and after its update."""

    optimizer: optax.GradientTransformation
    old: Any
    new: Any


def masked(mask: Any, x: jax.Array) -> jax.Array:
    """Zero where the mask is False; x itself for a dense leaf."""
    return x if is_dense(mask) else jnp.where(mask, x, jnp.zeros_like(x))


def whole(
    old: list[Any],
    new: list[Any],
    frozen: Any,
    updates: list[jax.Array],
    weights: list[jax.Array],
    inner: Inner | None,
    treedef: Any,
) -> tuple[list[jax.Array], Any]:
    """The emitted updates of whole leaves, and the inner state.

    Args:
      old: the masks before, `MaskedNode` for what is dense.
      new: the masks after.
      frozen: whether nothing but the masks may change; False (a Python bool) if never.
      updates: of the inner optimizer, for each leaf.
      weights: the parameters.
      inner: the optimizer, None if there is none.
      treedef: of the parameters.
    """
    # What has just grown starts at zero, like the rest.
    alive = [m if is_dense(m) else m & n for m, n in zip(old, new, strict=True)]
    emitted = [_emit(*row, frozen) for row in zip(alive, updates, weights, strict=True)]
    if inner is None:
        return emitted, ()
    params = jax.tree.unflatten(treedef, weights)
    start = jax.tree.unflatten(treedef, map(masked, alive, weights))
    pick = functools.partial(_moment, alive, frozen)
    return emitted, merge(inner.new, inner.old, inner.optimizer.init(start), params, pick)


def _freeze(frozen: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` on a mask step; `new` itself, with no select, where there can be none."""
    return new if frozen is False else jnp.where(frozen, old, new)


def _emit(alive: Any, update: jax.Array, weight: jax.Array, frozen: Any) -> jax.Array:
    """The update of one leaf: -weight where not alive, nothing at all on a mask step."""
    update = _freeze(frozen, update, jnp.zeros_like(update))
    if is_dense(alive):
        return update
    exact = jnp.promote_types(update.dtype, weight.dtype)  # a narrower -weight would not cancel
    return jnp.where(alive, update.astype(exact), -weight.astype(exact))


def _moment(
    alive: list[Any], frozen: Any, i: int, new: jax.Array, old: jax.Array, initial: jax.Array
) -> jax.Array:
    """A moment of leaf i: as it was on a mask step, its initial value where not alive."""
    moment = _freeze(frozen, new, old)
    return moment if is_dense(alive[i]) else jnp.where(alive[i], moment, initial)


def packed(
    old: list[Any],
    new: list[Any],
    is_round: Any,
    frozen: Any,
    indices: list[Any],
    updates: list[jax.Array],
    weights: list[jax.Array],
    seen: list[jax.Array],
    inner: Inner,
    treedef: Any,
) -> tuple[list[Any], Any, list[Any]]:
    """The same with packed leaves: updates as `SparseUpdate`, the inner state, the new indices.

    Only a mask step moves anything: moments go with their weights to where the new indices
    have them, and what has grown starts at the initial value.

    Args:
      old, new, frozen, weights, inner, treedef: as for `whole`.
      is_round: whether this is a mask step; False (a Python bool) if never.
      indices: of the active weights before, `MaskedNode` for what is dense.
      updates: of the inner optimizer, packed.
      seen: the parameters as the inner optimizer sees them, packed.
    """
    sparse = [i for i, where in enumerate(indices) if not is_dense(where)]

    def move() -> tuple[list[jax.Array], list[jax.Array], Any]:
        found = new_indices(new, indices)
        survives = [take(new[i], indices[i]) for i in sparse]
        alive = [
            where if is_dense(where) else take(m, where)
            for where, m in zip(found, old, strict=True)
        ]
        start = [
            weight if is_dense(where) else masked(a, take(weight, where))
            for where, a, weight in zip(found, alive, weights, strict=True)
        ]

        def carry(i: int, new: jax.Array, old: jax.Array, initial: jax.Array) -> jax.Array:
            moment = _freeze(frozen, new, old)
            if is_dense(indices[i]):
                return moment
            spread = put(jnp.zeros_like(weights[i], moment.dtype), indices[i], moment)
            return jnp.where(alive[i], take(spread, found[i]), initial)

        initial = inner.optimizer.init(jax.tree.unflatten(treedef, start))
        state = merge(inner.new, inner.old, initial, jax.tree.unflatten(treedef, seen), carry)
        return [found[i] for i in sparse], survives, state

    def stay() -> tuple[list[jax.Array], list[jax.Array], Any]:
        where = [indices[i] for i in sparse]
        return where, [jnp.ones_like(seen[i], bool) for i in sparse], inner.new

    after, survives, state = stay() if is_round is False else lax.cond(is_round, move, stay)
    emitted: list[Any] = [_freeze(frozen, u, jnp.zeros_like(u)) for u in updates]
    found = list(indices)
    for i, where, survived in zip(sparse, after, survives, strict=True):
        found[i] = where
        emitted[i] = SparseUpdate(indices[i], _emit(survived, emitted[i], seen[i], False))
    return emitted, state, found


def new_indices(masks: list[Any], indices: list[Any]) -> list[Any]:
    """Where the active weights of new masks are, for the leaves that have indices."""
    rows = zip(masks, indices, strict=True)
    return [
        where if is_dense(where) else positions(mask, where.shape[-1], where.shape[:-1])
        for mask, where in rows
    ]


def dense(update: Any, weight: jax.Array) -> jax.Array:
    """A `SparseUpdate` as an update of the whole leaf: -weight where it has nothing."""
    if not isinstance(update, SparseUpdate):
        return update
    return put(-weight.astype(update.values.dtype), *update)
