"""A step of packed leaves: the inner optimizer sees, and keeps moments of, the active weights.

On ordinary steps only the active entries of the parameters are read and written, in place.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dstee_jax.engine.hold import update_or_hold
from dstee_jax.engine.inputs import Carry, StepInputs
from dstee_jax.engine.moments import owners
from dstee_jax.engine.packing import add, spread, take_each
from dstee_jax.engine.round import run_round
from dstee_jax.engine.whole import emit, stepped, stopped
from dstee_jax.trees import is_dense, masked


def ordinary_step(inputs: StepInputs, now: Carry, hold: jax.Array | bool) -> Carry:
    """The inner optimizer's step on the active weights; arguments as for `whole`'s."""
    assert inputs.config.inner is not None
    at = now.params or inputs.weights
    grads, seen = (take_each(x, now.places) for x in (inputs.outgoing, at))
    trees = inputs.tree(grads), now.inner_state, inputs.tree(seen)
    updates, state = update_or_hold(inputs.config.inner, *trees, inputs.extra, hold)
    updates = [stopped(u, hold) for u in updates]

    def leaf(i: int) -> jax.Array:
        weight, where, update = at[i], now.places[i], updates[i]
        if is_dense(where):  # all weights are active, unless the state is another optimizer's
            mask = now.stays[i] if now.stays else now.masks[i]
            return stepped(mask, weight, update, inputs.as_params)
        if inputs.as_params:
            return add(weight, where, update)
        return spread(weight, where, emit(now.stays[i], update, seen[i]) if now.stays else update)

    out = [leaf(i) for i in range(len(at))]
    return now._replace(**{"params" if inputs.as_params else "updates": out}, inner_state=state)


def exchange(inputs: StepInputs, due: jax.Array | bool, now: Carry) -> Carry:
    """A round: new masks and places; what grows starts at zero, with new moments."""
    after = run_round(inputs, due, now)
    stays = [
        old if is_dense(old) else old & new for old, new in zip(now.masks, after.masks, strict=True)
    ]
    if inputs.as_params:
        after = after._replace(params=list(map(masked, stays, now.params)))
    elif now.updates:
        after = after._replace(updates=list(map(emit, stays, now.updates, inputs.weights)))
    else:
        pairs = zip(stays, after.places, strict=True)
        after = after._replace(stays=[m if is_dense(x) else x.stays(m) for m, x in pairs])
    return after._replace(inner_state=_moved(inputs, now, after))


def first_stays(now: Carry) -> list[Any]:
    """Which weights have been active before the step and stay so; of packed leaves, packed."""
    pairs = zip(now.masks, now.places, strict=True)
    return [mask if is_dense(x) else jnp.ones_like(x.zeros(jnp.bool_)) for mask, x in pairs]


def _moved(inputs: StepInputs, now: Carry, after: Carry) -> Any:
    """The inner state after a round.

    Moments go with their weights to where these are now packed, and what has grown starts
    at the initial value.
    """
    moves, start = {}, list(map(jnp.zeros_like, inputs.weights))
    for i, where in enumerate(after.places):
        if not is_dense(where):
            moves[i], start[i] = where.moved(now.masks[i]), where.zeros(inputs.weights[i].dtype)
    inner, params = inputs.config.inner, inputs.tree(start)
    assert inner is not None
    leaves, treedef = jax.tree.flatten(now.inner_state)
    rows = zip(owners(inner, params), leaves, jax.tree.leaves(inner.init(params)), strict=True)
    new = [moves[i](x, initial) if i in moves else x for i, x, initial in rows]
    return jax.tree.unflatten(treedef, new)
