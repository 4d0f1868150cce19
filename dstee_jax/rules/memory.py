"""What a method keeps of its own for each weight, beside mask and counter.

A memory is a pair of functions, as an optax transformation is; its value for a leaf is what
scores and penalties see as `leaf.rule_state`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dstee_jax.arguments import check_number
from dstee_jax.selection.bisection import largest_of_all
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf, RuleState, at_least_float32
from dstee_jax.trees import PyTree, is_dense, mask_leaves, replace_leaves


class Memory(NamedTuple):
    """A method's own state of one leaf.

    Attributes:
      init: `(param, key) -> array`, of the parameter's shape, or with axes before it.
      update: `leaf -> array`, called on every step with the dense gradient of the step and the
        old value in `leaf.rule_state`.
    """

    init: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[[Leaf], jax.Array]


def dense_momentum(decay: float = 0.9) -> Memory:
    """Heavy-ball momentum of the dense gradient, m = decay * m + g, for every weight.

    In the parameter's dtype: as many bytes as the parameter.

    Args:
      decay: in [0, 1).

    Raises:
      ValueError: it is not.

    References:
      Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019, Section 3.
    """
    check_number("decay", decay, "0.9")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be in [0, 1), as 0.9.")

    def update(leaf: Leaf) -> jax.Array:
        return (decay * leaf.rule_state + leaf.grad).astype(leaf.rule_state.dtype)

    return Memory(lambda param, key: jnp.zeros_like(param), update)


def signs() -> Memory:
    """A fixed sign for each weight: that of its initial value, random where that is zero.

    bool, True for positive: one byte a weight.

    References:
      Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018, Algorithm 1.
    """

    def init(param: jax.Array, key: jax.Array) -> jax.Array:
        coin = jax.random.bernoulli(key, 0.5, param.shape, out_sharding=sharding_of(param))
        return jnp.where(param == 0, coin, param > 0)

    return Memory(init, lambda leaf: leaf.rule_state)


def admm(start: int, stop: int, every: int) -> Memory:
    """ADMM's auxiliary variables z (sparse copy of the weights) and u (scaled dual).

    At step `start`, and every `every` steps after it up to `stop`: z = the w + u of largest
    magnitude, as many as the leaf's target count, zero elsewhere; u = w + u - z. Shape
    (2, *shape), the parameter's dtype.

    Args:
      start, stop, every: steps.

    References:
      Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction
      Method of Multipliers", 2018, Eq. 7 to 9.
    """

    def update(leaf: Leaf) -> jax.Array:
        def project() -> jax.Array:
            _, u = leaf.rule_state
            total = leaf.param + u
            keep = leaf.param.size if leaf.target is None else leaf.target
            (kept,) = largest_of_all([jnp.abs(total)], keep)
            z = jnp.where(kept, total, 0)
            return jnp.stack([z, total - z]).astype(leaf.rule_state.dtype)

        due = (leaf.count >= start) & (leaf.count <= stop) & ((leaf.count - start) % every == 0)
        return jax.lax.cond(due, project, lambda: leaf.rule_state)

    return Memory(lambda param, key: jnp.zeros((2, *param.shape), param.dtype), update)


def first_rule_state(
    memory: Memory | None,
    plan_state: Any,
    params: PyTree,
    masks: PyTree,
    key: jax.Array,
    sums_gradients: bool,
    keeps_grown: bool,
) -> Any:
    """`()`, or the RuleState of a method that keeps something of its own."""
    if memory is None and not sums_gradients and not keeps_grown:
        return RuleState((), plan_state, ()) if jax.tree.leaves(plan_state) else ()
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        return RuleState(params, plan_state, params, params)

    def each(make: Callable[[jax.Array, jax.Array], jax.Array]) -> PyTree:
        kept = [
            mask if is_dense(mask) else make(jnp.asarray(leaf), jax.random.fold_in(key, i))
            for i, (leaf, mask) in enumerate(zip(leaves, mask_leaves(masks, params), strict=True))
        ]
        return jax.tree.unflatten(treedef, kept)

    def zeros(param: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.zeros_like(param, at_least_float32(param.dtype))

    return RuleState(
        () if memory is None else each(memory.init),
        plan_state,
        each(zeros) if sums_gradients else (),
        jax.tree.map(lambda m: jnp.zeros_like(m, jnp.int32), masks) if keeps_grown else (),
    )


def recall(rule_state: Any, params: PyTree) -> tuple[list[Any], PyTree, list[Any], list[Any]]:
    """Each leaf's memory (`()` where there is none), the plan's state, sums of gradients, grown."""
    memory, plan_state, sums, grown = rule_state or ((), (), (), ())

    def each(tree: PyTree) -> list[Any]:
        if jax.tree.leaves(tree):
            return mask_leaves(tree, params)
        return [()] * len(jax.tree.leaves(params))

    return each(memory), plan_state, each(sums), each(grown)


def remember(
    rule_state: Any,
    params: PyTree,
    kept: list[Any],
    plan_state: PyTree,
    sums: list[Any],
    grown: list[Any],
) -> Any:
    """`rule_state` with what `recall` gives, new."""
    if not rule_state:
        return rule_state

    def each(tree: PyTree, new: list[Any]) -> PyTree:
        return replace_leaves(tree, params, new) if jax.tree.leaves(tree) else tree

    return RuleState(
        each(rule_state.memory, kept),
        plan_state,
        each(rule_state.gradients, sums),
        each(rule_state.grown, grown),
    )
