"""What a step emits, and what the inner optimizer keeps: of whole leaves, and of packed ones.

Alive is a weight that is active before and after the step. Where it is not, the update is
-weight, so that the parameter becomes exactly zero, and the moments are their initial values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.engine.moments import merge
from dstee_jax.engine.packed import add, exact, ranks, reorder, spread, take, take_each, zeros
from dstee_jax.engine.round import at_most_once
from dstee_jax.engine.step import Changing, Step
from dstee_jax.trees import is_dense, masked


def whole(
    step: Step,
    outgoing: list[jax.Array],
    now: Changing,
    due: Any,
    as_params: bool,
    extra: Mapping[str, Any],
) -> tuple[list[jax.Array], Changing]:
    """A step of whole leaves: the emitted updates or parameters, and what it changes.

    Args:
      step: what the call was given.
      outgoing: the gradients, or the updates that came down the chain.
      now: before the step.
      due: whether this is a mask step; False (a Python bool) if it cannot be one.
      as_params: emit parameters; inactive ones must be zero already.
      extra: arguments of the inner optimizer.
    """
    rows = zip(step.full, step.masks, strict=True)
    old = [optax.MaskedNode() if full else mask for full, mask in rows]
    updates, weights, inner = list(map(masked, old, outgoing)), step.weights, step.sparse.inner
    old_state = new_state = now.inner_state
    if inner is not None:
        trees = step.tree(updates), old_state, step.tree(weights)
        tree, new_state = inner.update(*trees, **extra)
        updates = jax.tree.leaves(tree)

    def round_(due: jax.Array, now: Changing) -> Changing:
        return step.round(due, now, lambda i: step.weight_seen(i, updates[i]))

    alive, frozen = old, False if step.sparse.update_weights else due
    if due is not False:
        now = at_most_once(due, round_, now._replace(inner_state=()))
        pairs = zip(old, now.masks, strict=True)
        alive = [m if is_dense(m) else m & new for m, new in pairs]
    emitted = list(map(_emit, alive, updates, weights, [frozen] * len(weights)))
    if as_params:
        emitted = list(map(optax.apply_updates, weights, emitted))
    if inner is None:
        return emitted, now._replace(inner_state=())

    def pick(i: int, new: jax.Array, old: jax.Array, initial: jax.Array) -> jax.Array:
        moment = _freeze(frozen, new, old)
        return moment if is_dense(alive[i]) else jnp.where(alive[i], moment, initial)

    # What has just grown starts at zero, like the rest.
    initial = inner.init(step.tree(list(map(masked, alive, weights))))
    merged = merge(new_state, old_state, initial, step.tree(weights), pick)
    return emitted, now._replace(inner_state=merged)


def _freeze(frozen: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` on a mask step, else `new`; no select where a Python bool says which."""
    if isinstance(frozen, bool):
        return old if frozen else new
    return jnp.where(frozen, old, new)


def _emit(alive: Any, update: jax.Array, weight: jax.Array, frozen: Any) -> jax.Array:
    """The update of one leaf: -weight where not alive, nothing at all on a mask step."""
    update = _freeze(frozen, update, jnp.zeros_like(update))
    if is_dense(alive):
        return update
    update = exact(update, weight)
    return jnp.where(alive, update, -weight.astype(update.dtype))


def packed(
    step: Step,
    outgoing: list[jax.Array],
    now: Changing,
    due: Any,
    as_params: bool,
    extra: Mapping[str, Any],
) -> tuple[list[jax.Array], Changing]:
    """A step of packed leaves: the emitted updates or parameters, and what it changes.

    Args:
      step, outgoing, now, due, as_params, extra: as for `whole`.
    """
    inner, weights = step.sparse.inner, step.weights
    assert inner is not None
    grads = step.tree(take_each(outgoing, now.indices))
    frozen = False if step.sparse.update_weights else due

    def inner_step(now: Changing, frozen: Any) -> Changing:
        at = now.emitted if as_params else weights
        seen = step.tree(take_each(at, now.indices))
        tree, state = inner.update(grads, now.inner_state, seen, **extra)
        updates = [_freeze(frozen, u, jnp.zeros_like(u)) for u in jax.tree.leaves(tree)]
        emitted = list(map(add if as_params else spread, at, now.indices, updates))

        def pick(i: int, new: jax.Array, old: jax.Array, _: jax.Array) -> jax.Array:
            return _freeze(frozen, new, old)

        if frozen is not False:
            state = merge(state, now.inner_state, now.inner_state, seen, pick)
        return now._replace(emitted=emitted, inner_state=state)

    def ordinary(now: Changing) -> Changing:
        return inner_step(now, frozen=False)

    def round_(due: jax.Array, now: Changing) -> Changing:
        if in_loop:
            now = inner_step(now, frozen=True)

        def weight(i: int) -> jax.Array:
            return now.emitted[i] if as_params else step.weight_seen(i, now.emitted[i])

        after = step.round(due, now, weight)
        emitted = list(now.emitted)
        for i, x in enumerate(emitted):
            if not is_dense(now.indices[i]):
                base = jnp.zeros_like(x) if as_params else -weights[i].astype(x.dtype)
                emitted[i] = jnp.where(after.masks[i], x, base)
        return after._replace(emitted=emitted, inner_state=_moved_moments(step, now, after))

    now = now._replace(emitted=weights if as_params else ())
    # An ordinary step in a loop of its own works in place; a select for mask steps would copy.
    in_loop = as_params and frozen is not False and _keeps_types(ordinary, now)
    if in_loop:
        now = at_most_once(~due, lambda _, now: ordinary(now), now)
    else:
        now = inner_step(now, frozen)
    if due is not False:
        now = at_most_once(due, round_, now)
    return now.emitted, now._replace(emitted=())


def _keeps_types(function: Callable[[Any], Any], carry: Any) -> bool:
    """Whether a loop can carry this: some optimizers' first step changes a type in their state."""
    before = [jax.typeof(x).strip_weak_type() for x in jax.tree.leaves(carry)]
    after = jax.make_jaxpr(function)(carry).out_avals
    return before == [x.strip_weak_type() for x in after]


def _moved_moments(step: Step, now: Changing, after: Changing) -> Any:
    """The inner state of packed leaves after a round.

    Moments go with their weights to where the new indices have them, and what has grown starts
    at the initial value.
    """
    order, stays, start = {}, {}, list(map(jnp.zeros_like, step.weights))
    for i, where in enumerate(after.indices):
        if not is_dense(where):
            order[i], stays[i] = ranks(now.masks[i], where), take(now.masks[i], where)
            start[i] = zeros(where, step.weights[i].dtype)

    def pick(i: int, moment: jax.Array, _: jax.Array, initial: jax.Array) -> jax.Array:
        if i not in order:
            return moment
        return jnp.where(stays[i], reorder(moment, order[i]), initial)

    params, state = step.tree(start), now.inner_state
    assert step.sparse.inner is not None
    return merge(state, state, step.sparse.inner.init(params), params, pick)
