"""The inner optimizer's step, with its arrays held where a mask step takes its place.

A select behind the step, `where(hold, old, new)`, would have XLA copy every moment: the updates
read the new one while the old one is still wanted. Here the select stands where the new array is
made, and all that follows reads the selected one: XLA works in place. The updates of a held step
mean nothing.
"""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.engine.moments import is_float
from dstee_jax.trees import PyTree


def update_or_hold(
    inner: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra: Mapping[str, Any],
    hold: jax.Array | bool,
) -> tuple[list[jax.Array], PyTree]:
    """The leaves of the updates, and the new state.

    Args:
      inner: the optimizer.
      grads, state, params, extra: as its `update` has them.
      hold: whether the step must leave the floating arrays of the state as they are; its step
        counts and keys go on, so that schedules reach their end. bool, shape ().
    """
    if isinstance(hold, bool):
        updates, new = inner.update(grads, state, params, **extra)
        return jax.tree.leaves(updates), _held(state, new) if hold else new
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
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, jax.tree.leaves(trees), strict=True))
    for equation in jaxpr.eqns:
        for var, x in _evaluated(jaxpr, equation, values):
            values[var] = jnp.where(hold, kept[var].astype(x.dtype), x) if var in kept else x
    out = [var.val if _constant(var) else values[var] for var in jaxpr.outvars]
    for j, (var, x) in enumerate(zip(made, old, strict=True), len(out) - len(old)):
        if is_float(x) and out[j] is not x and (_constant(var) or var not in kept):
            out[j] = jnp.where(hold, x, out[j])
    updates, new = jax.tree.unflatten(jax.tree.structure(shapes), out)
    return jax.tree.leaves(updates), new


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


def _held(old: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(lambda o, n: o if is_float(o) else n, old, new)


def _constant(var: Any) -> bool:
    """Whether an operand of a jaxpr is a literal."""
    return hasattr(var, "val")


def _evaluated(jaxpr: Any, equation: Any, values: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """The variables that one equation makes, with their values."""
    given = list(dict.fromkeys(var for var in equation.invars if not _constant(var)))
    one = jaxpr.replace(eqns=[equation], invars=given, constvars=[], outvars=equation.outvars)
    out = jax.core.eval_jaxpr(one, (), *(values[var] for var in given))
    return list(zip(equation.outvars, out, strict=True))
