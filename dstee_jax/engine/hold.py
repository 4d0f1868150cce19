"""The inner optimizer's step, with its arrays held where a mask step takes its place.

A select behind the step, `where(hold, old, new)`, would have XLA copy every moment: the updates
read the new one while the old one is still wanted. Here the select stands where the new array is
made, and all that follows reads the selected one: XLA works in place. The updates of a held step
mean nothing.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dstee_jax.engine.bits import either
from dstee_jax.engine.moments import is_float
from dstee_jax.trees import PyTree, is_dense


def update_or_hold(
    inner: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, Any],
    hold: jax.Array | bool,
    masks: Sequence[Any] = (),
) -> tuple[list[jax.Array], PyTree]:
    """The leaves of the updates, and the new state.

    Args:
      inner: the optimizer.
      grads, state, params, extra: as its `update` has them.
      hold: whether the step must leave the floating arrays of the state as they are; its step
        counts and keys go on, so that schedules reach their end. bool, shape ().
      masks: what the optimizer sees of each leaf of `grads`: zero where it is False, all where it
        is a `MaskedNode`; () for all of every leaf.
    """
    trees = grads, state, params

    def update(grads: PyTree, state: PyTree, params: PyTree) -> Any:
        return inner.update(grads, state, params, **extra)

    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*trees)
    jaxpr, old = closed.jaxpr, jax.tree.leaves(state)
    made = jaxpr.outvars[-len(old) :] if old else []
    # A gradient that the state keeps as it came, or one array in two places: selected at the end.
    computed = {var for equation in jaxpr.eqns for var in equation.outvars}
    places = collections.Counter(var for var in made if not _constant(var))
    kept = {
        var: x
        for var, x in zip(made, old, strict=True)
        if is_float(x) and not _constant(var) and var in computed and places[var] == 1
    }
    values = _Values(dict(zip(jaxpr.invars, masks, strict=False)))
    values.update(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, jax.tree.leaves(trees), strict=True))
    for equation in jaxpr.eqns:
        for var, x in _evaluated(jaxpr, equation, values):
            values[var] = _selected(hold, kept[var], x) if var in kept else x
    out = [var.val if _constant(var) else values[var] for var in jaxpr.outvars]
    for j, (var, x) in enumerate(zip(made, old, strict=True), len(out) - len(old)):
        if is_float(x) and out[j] is not x and (_constant(var) or var not in kept):
            out[j] = _selected(hold, x, out[j])
    updates, new = jax.tree.unflatten(jax.tree.structure(shapes), out)
    return jax.tree.leaves(updates), new


class _Values(dict[Any, Any]):
    """What the variables of a jaxpr are; gradients are masked where they are read.

    Each reader has a mask of its own as far as XLA can see. One masked gradient with two readers
    (Nesterov's momentum) would be written to memory for them: twice the time of the whole step.
    """

    def __init__(self, masks: Mapping[Any, Any]):
        super().__init__()
        self.masks = {var: mask for var, mask in masks.items() if not is_dense(mask)}

    def __getitem__(self, var: Any) -> Any:
        value = super().__getitem__(var)
        if var not in self.masks:
            return value
        mask = self.masks[var]
        self.masks[var] = lax.optimization_barrier(mask)
        return either(mask, value, jnp.zeros_like(value))


def never_updated(
    inner: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, Any],
) -> list[bool]:
    """For each parameter, whether its update is a constant: it depends on nothing."""

    def updates(grads: PyTree, state: PyTree, params: PyTree) -> Any:
        return inner.update(grads, state, params, **extra)[0]

    jaxpr = jax.make_jaxpr(updates)(grads, state, params).jaxpr
    moving = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not _constant(var) and var in moving for var in equation.invars):
            moving.update(equation.outvars)
    return [_constant(var) or var not in moving for var in jaxpr.outvars]


def _selected(hold: jax.Array | bool, old: jax.Array, new: jax.Array) -> jax.Array:
    if isinstance(hold, bool):
        return old if hold else new
    return jnp.where(hold, old.astype(new.dtype), new)


def _constant(var: Any) -> bool:
    """Whether an operand of a jaxpr is a literal."""
    return hasattr(var, "val")


def _evaluated(jaxpr: Any, equation: Any, values: _Values) -> list[tuple[Any, Any]]:
    """The variables that one equation makes, with their values."""
    given = list(dict.fromkeys(var for var in equation.invars if not _constant(var)))
    one = jaxpr.replace(eqns=[equation], invars=given, constvars=[], outvars=equation.outvars)
    out = jax.core.eval_jaxpr(one, (), *(values[var] for var in given))
    return list(zip(equation.outvars, out, strict=True))
