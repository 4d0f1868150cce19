"""The `update` of `transform`: from state to state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine import emit
from dstee_jax.engine.config import Sparse
from dstee_jax.engine.round import is_mask_step
from dstee_jax.engine.step import Changing, Step, leaves_like
from dstee_jax.rules.memory import recall, remember
from dstee_jax.state import SparseState
from dstee_jax.trees import PyTree, mask_leaves, path_name, replace_leaves


def update(
    sparse: Sparse,
    updates: PyTree,
    state: SparseState,
    params: PyTree | None = None,
    *,
    mask_step: bool = True,
    as_params: bool = False,
    **extra: Any,
) -> tuple[PyTree, SparseState]:
    """The `update` of `transform`.

    Args:
      sparse: what was asked for.
      updates, state, params: as optax has them.
      mask_step: False if this is no mask step; True leaves it to the schedule.
      as_params: return the new parameters, not their updates.
      **extra: of the inner optimizer, and `grad`.
    """
    if params is None:
        raise ValueError(
            "dstee.transform needs the parameters: call tx.update(grads, opt_state, params)."
        )
    if not isinstance(mask_step, bool | np.bool_):
        raise ValueError(
            f"mask_step={mask_step} must be True or False when the step is compiled: make it a "
            "static argument of jit."
        )
    leaves, treedef = jax.tree.flatten(params)
    outgoing = leaves_like(treedef, updates, "grads")
    grads = updates if sparse.inner is not None else extra.get("grad")
    layout, facts = sparse.layout(params)
    kept, plan_state, sums = recall(state.rule_state, params)
    step = Step(
        sparse=sparse,
        treedef=treedef,
        names=[path_name(path) for path, _ in layout.leaves],
        facts=facts,
        full=sparse.full(params, facts),
        key=state.key,
        count=optax.safe_increment(state.count),
        weights=[jnp.asarray(leaf) for leaf in leaves],
        grads=[None] * len(leaves) if grads is None else leaves_like(treedef, grads, "grad="),
        masks=mask_leaves(state.masks, params),
        counters=mask_leaves(state.counters, params),
        kept=kept,
        sums=sums,
    )
    outgoing = step.penalised(outgoing)
    step = dataclasses.replace(step, kept=step.remembered(), sums=step.added_up())

    indices: list[Any] = [optax.MaskedNode()] * len(leaves)
    if sparse.indices:
        indices = mask_leaves(state.indices, params)
    now = Changing(step.masks, step.counters, plan_state, indices, state.inner_state)
    due: Any = False
    if mask_step:
        due = is_mask_step(sparse.rule, sparse.rounds, facts, step.masks, step.count)
    how = emit.packed if sparse.packed else emit.whole
    emitted, now = how(step, outgoing, now, due, as_params, extra)
    return jax.tree.unflatten(step.treedef, emitted), SparseState(
        count=step.count,
        key=state.key,
        masks=replace_leaves(state.masks, params, now.masks),
        counters=replace_leaves(state.counters, params, now.counters),
        rule_state=remember(state.rule_state, params, step.kept, now.plan_state, step.sums),
        inner_state=now.inner_state,
        needs_dense=sparse.needs_dense(step.count + 1),
        indices=replace_leaves(state.indices, params, now.indices) if sparse.indices else (),
    )
