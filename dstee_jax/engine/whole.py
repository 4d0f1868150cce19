"""A step of whole leaves: inactive gradients are masked on the way in, inactive weights out.

Between mask steps nobody looks at what the inner optimizer keeps of inactive weights, so that an
ordinary step costs the optimizer and two masks, which XLA fuses with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.engine.bits import either
from dstee_jax.engine.hold import update_or_hold
from dstee_jax.engine.inputs import Carry, StepInputs
from dstee_jax.engine.moments import restarted
from dstee_jax.engine.packing import exact
from dstee_jax.engine.round import run_round
from dstee_jax.trees import is_dense, masked


def ordinary_step(inputs: StepInputs, now: Carry, hold: jax.Array | bool) -> Carry:
    """The inner optimizer's step, or the updates that came down the chain; masked.

    Args:
      inputs: what the step was given.
      now: before it.
      hold: whether no weight is to be updated.
    """
    at = now.params or inputs.weights
    masks = now.stays or now.masks
    seen = [optax.MaskedNode() if f else m for f, m in zip(inputs.full, masks, strict=True)]
    if inputs.config.inner is None:
        updates, state = list(map(masked, seen, inputs.outgoing)), now.inner_state
    else:
        trees = inputs.tree(inputs.outgoing), now.inner_state, inputs.tree(at)
        updates, state = update_or_hold(inputs.config.inner, *trees, inputs.extra, hold, seen)
    updates = [stopped(u, hold) for u in inputs.scaled(updates, at, now)]
    rows = zip(masks, at, updates, strict=True)
    out = [stepped(*row, inputs.as_params) for row in rows]
    return now._replace(**{"params" if inputs.as_params else "updates": out}, inner_state=state)


def exchange(inputs: StepInputs, due: jax.Array | bool, now: Carry) -> Carry:
    """A round: new masks; what is dropped and what grows starts at zero, with new moments."""
    after = run_round(inputs, due, now)
    pairs = list(zip(now.masks, after.masks, strict=True))
    stays = [old if is_dense(old) else old & new for old, new in pairs]
    if inputs.as_params:
        after = after._replace(params=list(map(masked, stays, now.params)))
    elif now.updates:
        after = after._replace(updates=list(map(emit, stays, now.updates, inputs.weights)))
    else:
        after = after._replace(stays=stays)
    if inputs.config.inner is None:
        return after
    changed = [old if is_dense(old) else old ^ new for old, new in pairs]
    params = inputs.tree(list(map(masked, stays, inputs.weights)))
    state = restarted(inputs.config.inner, now.inner_state, params, changed)
    return after._replace(inner_state=state)


def first_stays(now: Carry) -> list[Any]:
    """Which weights of each leaf have been active before the step and stay so."""
    return now.masks


def stopped(update: jax.Array, hold: jax.Array | bool) -> jax.Array:
    """Zero on a step that updates no weight."""
    if isinstance(hold, bool):
        return jnp.zeros_like(update) if hold else update
    return jnp.where(hold, jnp.zeros_like(update), update)


def stepped(mask: Any, weight: jax.Array, update: jax.Array, as_params: bool) -> jax.Array:
    """A leaf after its update, zero where the mask is False; or the update that makes it so."""
    if as_params:
        return masked(mask, optax.apply_updates(weight, update))
    return emit(mask, update, weight)


def emit(alive: Any, update: jax.Array, weight: jax.Array) -> jax.Array:
    """The update of one leaf, -weight where the mask is False: then the weight becomes zero."""
    if is_dense(alive):
        return update
    update = exact(update, weight)
    return either(alive, update, -weight.astype(update.dtype))
