"""`carry_over`: go on from a state with another sparsity, or from dense, or to it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.engine import packing
from dstee_jax.engine.compatible import first_state, same_names
from dstee_jax.engine.config import Config
from dstee_jax.engine.moments import owners, restarted
from dstee_jax.masks.counts import LeafSpec
from dstee_jax.selection.exchange import Exchange, exchange
from dstee_jax.selection.parts import inner_axes, split
from dstee_jax.state import SparseState, get_states, wrap_key
from dstee_jax.trees import (
    PyTree,
    expanded,
    is_dense,
    mask_leaves,
    masked,
    replace_leaves,
    unwrap,
)


def carry_over(
    opt_state: PyTree,
    tx: optax.GradientTransformation,
    params: PyTree,
) -> PyTree:
    """A state of another optimizer that goes on where a state is: other sparsity, dense, sparse.

    Where fewer weights are to be active, those of largest magnitude stay; where more, all stay and
    others grow at random, at zero. Weights that stay keep their moments and counters, what has
    grown starts as new, and step counts go on, so that schedules keep their place: from a sparse
    state give `tx` the `total_steps` of the whole training. From a dense one the optimizer's count
    goes on and rounds count from 0: give it those still to come. What a method keeps of its own
    (memory, plan, summed gradients) is kept if the new one keeps the same. Then make the parameters
    fit: `params = dstee.apply_masks(params, opt_state)`.

    Args:
      opt_state: the state, sparse or dense, packed or not; made by an optimizer that is as `tx`
        but for `dstee.transform` around the inner one and its arguments. Concrete.
      tx: the new optimizer: an `optax` one for dense, or with `dstee.transform` in it.
      params: the parameters at this step.

    Returns:
      A state for `tx.update`.

    Raises:
      ValueError: the states are of different optimizers, or a structure (`structure=`) would
        have to be adapted.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> dense, params = optax.adam(1e-3), {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> sparse = dstee.transform(dense, sparsity=0.75, total_steps=200, key=jax.random.key(0))
      >>> opt_state = dstee.carry_over(dense.init(params), sparse, params)
      >>> dstee.apply_masks(params, opt_state)["kernel"][3].tolist()
      [12.0, 13.0, 14.0, 15.0]
    """
    expected, configs = first_state(tx, params)
    olds: list[Any] = get_states(opt_state) or [None] * max(len(configs), 1)
    if configs and len(olds) != len(configs):
        raise ValueError(
            f"opt_state has {len(olds)} SparseStates and tx {len(configs)}: carry over between "
            "optimizers that differ in one dstee.transform, or in its arguments."
        )
    dense = _without_masks(unwrap(opt_state))
    same_names(dense, _without_masks(unwrap(expected)))
    if not configs:
        return _unpacked(dense, tx, params, olds[0])
    treedef: Any = jax.tree.structure(expected, is_leaf=_is_sparse)
    nodes = jax.tree.leaves(expected, is_leaf=_is_sparse)
    pairs = iter(zip(configs, olds, strict=True))
    new = [
        _sparse(*next(pairs), part, params) if _is_sparse(node) else part
        for node, part in zip(nodes, treedef.flatten_up_to(dense), strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def _is_sparse(node: Any) -> bool:
    return isinstance(node, SparseState)


def _without_masks(opt_state: PyTree) -> PyTree:
    """What the state would be without `transform` around the inner optimizer."""

    def inner(node: Any) -> Any:
        return node.inner_state if _is_sparse(node) else node

    return jax.tree.map(inner, opt_state, is_leaf=_is_sparse)


def _sparse(config: Config, old: SparseState | None, inner_state: Any, params: PyTree) -> Any:
    """The new state, from the old one (None where it was dense) and the inner state in it."""
    fresh = config.init(params)
    layout, specs = config.layout(params)
    before = _masks(old.masks if old else None, params, specs)
    leaves, treedef = jax.tree.flatten(params)
    fresh_masks = mask_leaves(fresh.masks, params)
    rows = zip(before, specs, leaves, fresh_masks, strict=True)
    key = wrap_key(fresh.key, config.key)
    after = [_adapted(config, *row, jax.random.fold_in(key, i)) for i, row in enumerate(rows)]
    kept = [config.of_tiles(mask, stack) for mask, stack in zip(after, layout.stacks, strict=True)]
    masks = jax.tree.unflatten(treedef, kept)
    counters = jax.tree.unflatten(treedef, _counters(config, old, kept, params))
    indices = config.first_indices(params, masks, specs) if config.indices else ()
    if config.inner is not None:
        whole = _unpacked(inner_state, config.inner, params, old)
        changed = [m if is_dense(m) else m ^ n for m, n in zip(before, after, strict=True)]
        seen = jax.tree.unflatten(treedef, list(map(masked, after, leaves)))
        inner_state = restarted(config.inner, whole, seen, changed)
        if config.packed:
            places = config.places(params, masks, indices)
            inner_state = _packed(inner_state, config.inner, params, places)
    count = fresh.count if old is None else old.count
    return fresh._replace(
        count=count,
        masks=masks,
        counters=counters,
        rule_state=_grown(_kept(old, fresh), before, after, count, params),
        inner_state=inner_state,
        needs_dense=config.needs_dense(count + 1),
        indices=indices,
    )


def _masks(masks: PyTree | None, params: PyTree, specs: Sequence[LeafSpec | None]) -> list[Any]:
    """The masks of weights before: all ones where a leaf was dense, if it is to be sparse."""
    leaves = jax.tree.leaves(params)
    found = [optax.MaskedNode()] * len(leaves) if masks is None else mask_leaves(masks, params)
    rows = zip(found, leaves, specs, strict=True)
    return [
        jnp.ones_like(x, bool) if is_dense(m) and spec else expanded(m, jnp.shape(x))
        for m, x, spec in rows
    ]


def _adapted(
    config: Config,
    before: Any,
    spec: LeafSpec | None,
    weight: jax.Array,
    fresh: Any,
    key: jax.Array,
) -> Any:
    """A leaf's new mask: the largest active weights, or all of them and some at random."""
    if is_dense(fresh) or spec is None:
        return fresh
    wanted = jnp.asarray(spec.target if config.rule.keeps_counts else spec.start, jnp.int32)
    if not config.rule.keeps_counts and not before.all():
        return before  # the plan brings the count to where it is to be
    active = jnp.sum(split(before, spec.grid), inner_axes(before.shape, spec.grid), dtype=jnp.int32)
    if config.rule.structure is not None:
        if not (active == wanted).all():
            raise ValueError(
                f"a leaf of shape {before.shape} has {active} active weights and is to have "
                f"{wanted}: masks with a structure are not adapted. Give the new masks as masks=."
            )
        return before
    more, fewer = jnp.maximum(wanted - active, 0), jnp.maximum(active - wanted, 0)
    draw = jax.random.uniform(key, before.shape)
    row = Exchange(before, jnp.abs(weight), draw, spec.grid, fewer, more, before.size)
    return exchange([row], regrow=False, selection="bisection")[0]


def _counters(
    config: Config, old: SparseState | None, masks: list[Any], params: PyTree
) -> list[Any]:
    """Counters of before; what has not been counted counts from here as at the start."""
    found: list[Any] = [optax.MaskedNode()] * len(masks)
    if old is not None:
        found = mask_leaves(old.counters, params)
    first = 1 if config.counter_init == "masks" else 0

    def one(mask: Any, counter: Any) -> Any:
        if is_dense(mask):
            return mask
        begin = first * mask.astype(config.counter_dtype)
        if not is_dense(counter) and counter.size > mask.size:  # of weights, where tiles are kept
            return begin
        counter = expanded(counter, mask.shape)
        return begin if is_dense(counter) else jnp.maximum(counter.astype(begin.dtype), begin)

    return [one(*pair) for pair in zip(masks, found, strict=True)]


def _kept(old: SparseState | None, fresh: SparseState) -> Any:
    """What the method keeps of its own, if the new one keeps arrays of the same kind."""
    if old is None:
        return fresh.rule_state
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), state.rule_state) for state in (old, fresh)]
    return old.rule_state if kinds[0] == kinds[1] else fresh.rule_state


def _grown(
    rule_state: Any, before: list[Any], after: list[Any], count: jax.Array, params: PyTree
) -> Any:
    """`rule_state` with this step for what grows here."""
    if not rule_state or not jax.tree.leaves(rule_state.grown):
        return rule_state
    rows = zip(mask_leaves(rule_state.grown, params), before, after, strict=True)
    new = [
        x if is_dense(x) or x.shape != a.shape else jnp.where(a & ~b, count, x) for x, b, a in rows
    ]
    return rule_state._replace(grown=replace_leaves(rule_state.grown, params, new))


def _unpacked(
    state: PyTree, inner: optax.GradientTransformation, params: PyTree, old: SparseState | None
) -> PyTree:
    """An inner state whose packed leaves are whole, with initial values of inactive weights."""
    if old is None or not jax.tree.leaves(old.indices):
        return state
    stored = zip(
        mask_leaves(old.indices, params),
        mask_leaves(old.masks, params),
        jax.tree.leaves(params),
        strict=True,
    )
    where = [packing.place(index, mask, jnp.shape(x)) for index, mask, x in stored]
    packed = jax.eval_shape(lambda p: packing.pack(p, where), params)
    leaves, treedef = jax.tree.flatten(state)
    rows = zip(
        leaves,
        jax.tree.leaves(jax.eval_shape(inner.init, packed)),
        jax.tree.leaves(inner.init(params)),
        owners(inner, params),
        strict=True,
    )

    def one(leaf: Any, kept: Any, initial: Any, owner: Any) -> Any:
        if not isinstance(owner, int) or is_dense(where[owner]) or leaf.shape != kept.shape:
            return leaf
        return where[owner].put(initial.astype(leaf.dtype), leaf)

    return jax.tree.unflatten(treedef, [one(*row) for row in rows])


def _packed(
    state: PyTree, inner: optax.GradientTransformation, params: PyTree, where: list[Any]
) -> PyTree:
    """An inner state of whole leaves, packed."""
    leaves, treedef = jax.tree.flatten(state)
    rows = zip(leaves, owners(inner, params), strict=True)
    new = [
        where[i].take(x) if isinstance(i, int) and not is_dense(where[i]) else x for x, i in rows
    ]
    return jax.tree.unflatten(treedef, new)
