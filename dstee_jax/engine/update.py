"""The `update` of `transform`: from state to state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine import packed, whole
from dstee_jax.engine.candidates import update_among
from dstee_jax.engine.checks import warn_of_frozen
from dstee_jax.engine.config import Config
from dstee_jax.engine.hold import never_updated
from dstee_jax.engine.inputs import Carry, StepInputs, leaves_like
from dstee_jax.engine.loops import at_most_once
from dstee_jax.engine.rectangles import rectangles
from dstee_jax.engine.round import is_mask_step
from dstee_jax.masks.counts import LeafSpec
from dstee_jax.rules.memory import recall, remember
from dstee_jax.state import SparseState, wrap_key
from dstee_jax.trees import (
    PyTree,
    is_dense,
    leaves_with_path,
    mask_leaves,
    path_name,
    replace_leaves,
)


def update(
    config: Config,
    updates: PyTree,
    state: SparseState,
    params: PyTree | None = None,
    *,
    mask_step: bool = True,
    as_params: bool = False,
    tiles: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """The `update` of `transform`.

    Args:
      config: what was asked for.
      updates, state, params: as optax has them.
      mask_step: False if this is no mask step; True leaves it to the schedule.
      as_params: return the new parameters, not their updates.
      tiles: of which params are rectangles, if there are candidates among them.
      **extra: of the inner optimizer, and `grad`.
    """
    if params is None:
        raise ValueError(
            "dstee.transform needs the parameters: call tx.update(grads, opt_state, params)."
        )
    if not isinstance(state, SparseState):
        raise ValueError(
            f"opt_state is a {type(state).__name__}, not what init returned: the order is "
            "tx.update(grads, opt_state, params), and dstee.apply(tx, grads, opt_state, params)."
        )
    if not isinstance(mask_step, bool | np.bool_):
        raise ValueError(
            f"mask_step={mask_step} must be True or False when the step is compiled: make it a "
            "static argument of jit."
        )

    def of_kernels(updates: PyTree, state: SparseState, params: PyTree, shapes: PyTree) -> Any:
        trees = updates, state, params, shapes
        return _update(config, *trees, bool(mask_step), as_params, extra)

    if tiles is None:
        return of_kernels(updates, state, params, params)
    return update_among(of_kernels, config, updates, state, params, tiles)


def _update(
    config: Config,
    updates: PyTree,
    state: SparseState,
    params: PyTree,
    shapes: PyTree,
    mask_step: bool,
    as_params: bool,
    extra: dict[str, Any],
) -> tuple[PyTree, SparseState]:
    """`update` of kernels that are dense or rectangles; weights are counted by `shapes`."""
    rectangular = rectangles(config, state, params, mask_step)
    args = config, updates, state, params, shapes, rectangular, as_params, extra
    inputs, plan_state = _inputs(*args)
    places: list[Any] = [optax.MaskedNode()] * len(inputs.weights)
    if config.indices:
        found = config.places(params, state.masks, state.indices)
        places = [
            optax.MaskedNode() if is_rectangle else x
            for is_rectangle, x in zip(rectangular, found, strict=True)
        ]
    params_now = inputs.weights if as_params else ()
    kept = (state.inner_state, inputs.masks, inputs.counters, plan_state, places, inputs.grown)
    now = Carry(*kept, params=params_now)
    due: Any = False
    if mask_step and config.moves(inputs.specs, inputs.masks, inputs.weights):
        due = is_mask_step(config, inputs.count)
        if isinstance(due, bool) and inputs.count == 1:  # not jitted: say now what a round lacks
            jax.eval_shape(lambda: _step(inputs, True, now).masks)
    now = _step(inputs, due, now)
    state = state._replace(
        count=inputs.count,
        rule_state=remember(
            state.rule_state, params, inputs.kept, now.plan_state, inputs.sums, now.grown
        ),
        inner_state=now.inner_state,
        needs_dense=config.needs_dense(inputs.count + 1),
    )
    if due is not False:
        state = state._replace(
            masks=replace_leaves(state.masks, params, now.masks),
            counters=replace_leaves(state.counters, params, now.counters),
        )
    if due is not False and config.indices:
        new = [x if is_dense(x) else x.index for x in now.places]
        state = state._replace(indices=replace_leaves(state.indices, params, new))
    return inputs.tree(list(now.params if as_params else now.updates)), state


def _inputs(
    config: Config,
    updates: PyTree,
    state: SparseState,
    params: PyTree,
    shapes: PyTree,
    rectangular: list[bool],
    as_params: bool,
    extra: dict[str, Any],
) -> tuple[StepInputs, Any]:
    """What a step is given, and the plan's state; rectangles as leaves that have no mask."""
    leaves, treedef = jax.tree.flatten(params)
    outgoing = [jnp.asarray(x) for x in leaves_like(params, updates, "grads")]
    grads: list[Any] = [None] * len(leaves)
    if config.inner is not None:
        grads = outgoing
    elif extra.get("grad") is not None:
        grads = [jnp.asarray(x) for x in leaves_like(params, extra["grad"], "grad=")]
    specs: list[LeafSpec | None] = [None] * len(leaves)  # of dense shapes alone
    if not any(rectangular):
        _, specs = config.layout(shapes)
    masks, counters = (mask_leaves(tree, params) for tree in (state.masks, state.counters))
    kept, plan_state, sums, grown = recall(state.rule_state, params)
    inputs = StepInputs(
        config=config,
        treedef=treedef,
        names=[path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)],
        specs=specs,
        full=config.full(shapes, specs),
        key=wrap_key(state.key, config.key),
        count=optax.safe_increment(state.count),
        weights=[jnp.asarray(leaf) for leaf in leaves],
        grads=grads,
        outgoing=outgoing,
        masks=[optax.MaskedNode() if s else m for s, m in zip(rectangular, masks, strict=True)],
        counters=counters,
        kept=kept,
        sums=sums,
        grown=grown,
        as_params=as_params,
        extra=extra,
    )
    if any(rectangular):
        return inputs, plan_state
    inputs = dataclasses.replace(inputs, outgoing=inputs.penalised())
    return dataclasses.replace(inputs, kept=inputs.remembered(), sums=inputs.added_up()), plan_state


def _step(inputs: StepInputs, due: Any, now: Carry) -> Carry:
    """An ordinary step, and a round in a loop of its own that works in place.

    A round comes after the optimizer's step if `update_weights`; else it comes first, and the
    optimizer's step then moves nothing.
    """
    config = inputs.config
    how = packed if config.packed else whole
    if due is False:
        return how.ordinary_step(inputs, now, hold=False)
    if config.inner is not None and not config.packed:
        trees = inputs.tree(inputs.outgoing), now.inner_state, inputs.tree(inputs.weights)
        still = never_updated(config.inner, *trees, inputs.extra)
        warn_of_frozen(
            inputs.names, [s and not is_dense(m) for s, m in zip(still, now.masks, strict=True)]
        )
    exchange = functools.partial(how.exchange, inputs)
    if config.update_weights:
        return at_most_once(due, exchange, how.ordinary_step(inputs, now, hold=False))
    if not inputs.as_params:
        now = now._replace(stays=how.first_stays(now))
    return how.ordinary_step(inputs, at_most_once(due, exchange, now), hold=due)
