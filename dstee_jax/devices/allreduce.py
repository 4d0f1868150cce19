"""`pmean`: average gradients over devices, and send only what the next update reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dstee_jax.engine.packing import place
from dstee_jax.selection.bisection import INDEX, linear_index
from dstee_jax.selection.parts import varying_axes
from dstee_jax.state import get_states
from dstee_jax.tiling.tiles import may_be_rectangle
from dstee_jax.trees import PyTree, is_dense, mask_leaves


def pmean(
    grads: PyTree,
    opt_state: PyTree,
    axis_name: Any,
    *,
    dense: bool | None = None,
    wire_dtype: Any = None,
    check: bool = False,
) -> PyTree:
    """Mean of the gradients over the devices of a mesh axis, inside `shard_map` or `pmap`.

    On ordinary steps only the entries of active weights travel, in one all-reduce, and the
    others come back as zero; on steps whose update reads the dense gradient (mask steps, the
    `grow_batches` before them, all steps of a method that keeps a memory) the dense gradient
    does. Whatever stands before `dstee.transform` in a chain, a clip by global norm say, sees
    the same zeros.

    Under `shard_map` with `check_vma=True`, the default, differentiating with respect to
    replicated parameters averages nothing and sends everything, dense: make them varying first,
    `jax.lax.pcast(params, axis_name, to="varying")`.

    Rectangles of tiles (`dstee.to_tiles`) have active weights alone, and travel as they are.

    Args:
      grads: the gradients of this device's part of the batch, the structure of the parameters.
      opt_state: the optimizer's state, the same on all devices of the axis, with the indices of
        the active weights: of `transform(..., packed=True)` or `transform(..., indices=True)`.
      axis_name: of the mesh axis, or a tuple of them.
      dense: whether the dense gradient travels, a Python bool, for a training loop that knows:
        `step in dstee.dense_steps_of(tx)`. None asks the state, by a conditional, for which the
        host of a GPU waits on every step. Where False is wrong, the inactive entries come back
        as NaN: nothing grows on that step.
      wire_dtype: send in this type, as `jnp.bfloat16`; default the gradients' own.
      check: raise an error, from the devices, when masks or counters differ between them. It
        costs a pass over both, and a callback to the host.

    Returns:
      The mean, in the structure, shapes and dtypes of `grads`.

    Raises:
      ValueError: `opt_state` has no indices, `dense` is traced, or the gradients have been summed
        already.
    """
    if not (dense is None or isinstance(dense, bool | np.bool_)):
        raise ValueError(
            f"dense={dense} must be True, False or None when the step is compiled: make it a "
            "static argument of jit."
        )
    states = get_states(opt_state)
    if not states or any(type(s.indices) is tuple and not s.indices for s in states):
        raise ValueError(
            f"opt_state has {len(states)} SparseStates, and pmean needs at least one, with "
            "indices: pass packed=True or indices=True to dstee.transform."
        )
    leaves, treedef = jax.tree.flatten(grads)
    _check_varying(leaves, axis_name)
    where: list[Any] = [optax.MaskedNode()] * len(leaves)
    for state in states:
        kept = (mask_leaves(tree, grads) for tree in (state.indices, state.masks))
        found = [_place(*row) for row in zip(leaves, *kept, strict=True)]
        where = [w if is_dense(f) else f for w, f in zip(where, found, strict=True)]
    if check:
        agree = replicas_agree(opt_state, axis_name)
        jax.debug.callback(_raise_unless, agree)

    def mean(x: jax.Array) -> jax.Array:
        sent = x if wire_dtype is None else x.astype(wire_dtype)
        return lax.pmean(sent, axis_name).astype(x.dtype)

    wanted = jnp.stack([state.needs_dense for state in states]).any()

    def active() -> list[jax.Array]:
        packed = [g if is_dense(w) else w.take(g) for g, w in zip(leaves, where, strict=True)]
        left_out = 0.0 if dense is None else jnp.where(wanted, jnp.nan, 0.0)
        return [
            g if is_dense(w) else w.put(jnp.full(full.shape, left_out, full.dtype), g)
            for g, w, full in zip(_in_one(mean, packed), where, leaves, strict=True)
        ]

    def whole() -> list[jax.Array]:
        return [mean(g) for g in leaves]

    if all(map(is_dense, where)):  # rectangles of tiles, or nothing sparse: one size on all steps
        found = _in_one(mean, leaves)
    elif dense is None:
        found = lax.cond(wanted, whole, active)
    else:
        found = whole() if dense else active()
    return jax.tree.unflatten(treedef, found)


def _place(grad: jax.Array, index: Any, mask: Any) -> Any:
    """Where the active entries of a gradient are; `MaskedNode` if all of it is to travel."""
    whole = is_dense(index) or may_be_rectangle(grad.shape, index, mask)
    return optax.MaskedNode() if whole else place(index, mask, grad.shape)


def replicas_agree(opt_state: PyTree, axis_name: Any) -> jax.Array:
    """Whether masks and counters are the same on all devices of a mesh axis; bool, shape ().

    Compares a 32-bit sum of each array, in which every position has its own weight.

    Args:
      opt_state: an optimizer's state, inside `shard_map` or `pmap`.
      axis_name: of the mesh axis, or a tuple of them.
    """
    arrays = [x for s in get_states(opt_state) for x in jax.tree.leaves((s.masks, s.counters))]
    sums = jnp.stack([_fingerprint(x) for x in arrays])
    return jnp.all(lax.pmax(sums, axis_name) == lax.pmin(sums, axis_name))


def _fingerprint(x: jax.Array) -> jax.Array:
    place = linear_index(x.shape, tuple(range(x.ndim)), x)
    weight = place * jnp.array(2654435761, INDEX) | jnp.ones((), INDEX)
    return jnp.sum(x.astype(INDEX) * weight, dtype=INDEX)


def _raise_unless(agree: Any) -> None:
    if not agree:
        raise ValueError(
            "masks or counters differ between devices: start all from one state (the same key), "
            "and average the gradients before every update."
        )


def _in_one(reduce: Any, arrays: list[jax.Array]) -> list[jax.Array]:
    """Reduce arrays as one vector of each dtype: one collective, not one for each."""
    result: list[Any] = [None] * len(arrays)
    for dtype in sorted({x.dtype for x in arrays}, key=str):
        mine = [i for i, x in enumerate(arrays) if x.dtype == dtype]
        vector = reduce(jnp.concatenate([arrays[i].reshape(-1) for i in mine]))
        start = 0
        for i in mine:
            result[i] = vector[start : start + arrays[i].size].reshape(arrays[i].shape)
            start += arrays[i].size
    return result


def _check_varying(leaves: list[jax.Array], axis_name: Any) -> None:
    names = set(axis_name) if isinstance(axis_name, tuple) else {axis_name}
    checked = varying_axes(lax.axis_index(axis_name)) >= names  # else types say nothing
    if checked and any(not names <= varying_axes(x) for x in leaves):
        raise ValueError(
            f"a gradient does not differ between the devices of {axis_name!r}: JAX has summed it "
            "already, dense, since it was taken with respect to replicated parameters. "
            f"Differentiate with respect to jax.lax.pcast(params, {axis_name!r}, to='varying')."
        )
