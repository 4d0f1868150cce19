"""The two functions of `transform`: the first state, and one step from state to state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dstee_jax import emit, packed
from dstee_jax import masks as masks_lib
from dstee_jax.counts import (
    Blocks,
    Facts,
    Layout,
    Sparsity,
    StackAxes,
    Where,
    check_parts,
    leaf_counts,
    total,
)
from dstee_jax.distributions import Distribution
from dstee_jax.emit import Inner, masked
from dstee_jax.memory import Memory, first_rule_state, recall, remember
from dstee_jax.rule import Rule, update_topology
from dstee_jax.schedule import Rounds
from dstee_jax.scores import Score
from dstee_jax.stacking import by_layer
from dstee_jax.state import (
    NO_GRAD,
    Leaf,
    LeafWithoutGrad,
    PyTree,
    SparseState,
    copy_key,
    is_dense,
    mask_leaves,
    path_name,
    replace_leaves,
)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """What `transform` was asked for, checked; its `init` and `update`."""

    inner: optax.GradientTransformationExtraArgs | None
    rule: Rule
    rounds: Rounds
    key: jax.Array
    sparsity: Sparsity
    distribution: Distribution
    where: Where
    masks: PyTree | None
    stack_axes: StackAxes | None
    blocks: Blocks | None
    memory: Memory | None
    penalty: Score | None
    update_weights: bool
    packed: bool
    indices: bool
    grow_batches: int
    counter_init: str
    counter_dtype: Any

    def layout(self, params: PyTree) -> tuple[Layout, list[Any]]:
        """How leaves are cut, and the counts of each: None where dense or masks are traced."""
        layout, plan = Layout(params, self.stack_axes, self.blocks), self.rule.plan
        if self.masks is not None:
            masks_lib.check_masks(self.masks, params)
            targets: list[Any] = [
                None if is_dense(m) or isinstance(m, jax.core.Tracer) else layout.of_mask(i, m)
                for i, m in enumerate(mask_leaves(self.masks, params))
            ]
            starts: list[Any] = targets
        else:

            def spread(sparsity: Sparsity) -> list[Any]:
                args = (sparsity, self.distribution, self.where, self.rule.structure, layout)
                return leaf_counts(params, *args)

            targets = spread(self.sparsity)
            starts = plan.first_counts(params, targets, spread)
        facts: list[Facts | None] = [
            None if target is None else Facts(target, start, layout.grid(i), layout.stacks[i])
            for i, (target, start) in enumerate(zip(targets, starts, strict=True))
        ]
        check_parts(layout, facts, plan.exchanges, self.rule.structure, self.indices)
        return layout, facts

    def full(self, params: PyTree, facts: list[Facts | None]) -> list[bool]:
        """Whether a leaf's mask is all ones for ever: then it costs nothing, as a dense leaf."""
        sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(params)]
        return [
            self.rule.plan.exchanges and fact is not None and total(fact.target) == size
            for fact, size in zip(facts, sizes, strict=True)
        ]

    def needs_dense(self, count: jax.Array) -> jax.Array:
        """Whether update number `count` reads the gradient of inactive weights; bool, ()."""
        if self.memory is not None:
            return jnp.ones((), bool)
        return self.rounds.until(count) < self.grow_batches

    def init(self, params: PyTree) -> SparseState:
        """The state before the first step."""
        seen = where_active = params
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            first = counters = params
        else:
            layout, facts = self.layout(params)
            first = self._first_masks(params, layout, facts)
            begin = jnp.array if self.counter_init == "masks" else jnp.zeros_like
            counters = jax.tree.map(lambda m: begin(m, self.counter_dtype), first)
            if self.indices:
                where_active = self._first_indices(params, first, facts)
            if self.packed:
                seen = packed.pack(params, where_active)
                packed.check_state(self.inner, params, seen)
        plan_state = self.rule.plan.init()
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            key=copy_key(self.key),
            masks=first,
            counters=counters,
            rule_state=first_rule_state(
                self.memory, plan_state, params, first, self.key, self.grow_batches > 1
            ),
            inner_state=() if self.inner is None else self.inner.init(seen),
            needs_dense=self.needs_dense(jnp.ones((), jnp.int32)),
            indices=where_active if self.indices else (),
        )

    def _first_masks(self, params: PyTree, layout: Layout, facts: list[Facts | None]) -> PyTree:
        if self.masks is None:
            starts = [None if fact is None else fact.start for fact in facts]
            return masks_lib.masks_of_counts(params, starts, self.key, self.rule.structure, layout)
        if self.rule.structure is not None:
            for (path, _), mask, axes in zip(
                layout.leaves, mask_leaves(self.masks, params), layout.stacks, strict=True
            ):
                masks_lib.check_structure(self.rule.structure, path, mask, axes)
        leaves, treedef = jax.tree.flatten(params)
        rows = zip(mask_leaves(self.masks, params), leaves, strict=True)
        return jax.tree.unflatten(
            treedef, [m if is_dense(m) else masks_lib.lay(m, x) for m, x in rows]
        )

    def _first_indices(self, params: PyTree, masks: PyTree, facts: list[Facts | None]) -> PyTree:
        rows = zip(mask_leaves(masks, params), facts, self.full(params, facts), strict=True)
        found = [
            optax.MaskedNode() if is_dense(mask) or full else _positions(mask, fact)
            for mask, fact, full in rows
        ]
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def update(
        self, updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        """One step."""
        if params is None:
            raise ValueError(
                "dstee.transform needs the parameters: call tx.update(grads, opt_state, params)."
            )
        as_sparse = extra.pop("sparse_updates", False)
        leaves, treedef = jax.tree.flatten(params)
        weights = [jnp.asarray(leaf) for leaf in leaves]
        outgoing = _leaves_like(treedef, updates, "grads")
        grads = updates if self.inner is not None else extra.get("grad")
        dense_grads: list[Any] = [None] * len(weights)
        if grads is not None:
            dense_grads = _leaves_like(treedef, grads, "grad=")
        masks_now = mask_leaves(state.masks, params)
        counters = mask_leaves(state.counters, params)
        layout, facts = self.layout(params)
        full = self.full(params, facts)
        old = [optax.MaskedNode() if f else m for f, m in zip(full, masks_now, strict=True)]
        count = optax.safe_increment(state.count)
        kept, plan_state, sums = recall(state.rule_state, params)

        def view(i: int, param: jax.Array, grad: Any) -> Leaf:
            return (Leaf if grad is not None else LeafWithoutGrad)(
                param=masked(masks_now[i], param),
                grad=grad,
                mask=masks_now[i],
                counter=counters[i],
                key=jax.random.fold_in(jax.random.fold_in(state.key, count), i),
                count=count,
                rule_state=kept[i],
                target=None if facts[i] is None else facts[i].of_layer(weights[i].shape),
            )

        def now(i: int) -> Leaf:
            return view(i, weights[i], dense_grads[i])

        stacks = {
            i: () if facts[i] is None else facts[i].stack
            for i, mask in enumerate(masks_now)
            if not is_dense(mask)
        }
        outgoing = self._penalised(now, stacks, outgoing)
        kept = self._remembered(now, stacks, kept)
        if self.grow_batches > 1:
            if grads is None:
                raise ValueError(f"grow_batches={self.grow_batches} sums gradients: {NO_GRAD}")
            sums = self._add_up(count, sums, dense_grads)

        dense = [optax.MaskedNode()] * len(weights)
        where_active = mask_leaves(state.indices, params) if self.indices else dense
        in_inner = where_active if self.packed else dense
        seen = packed.take_each(weights, in_inner)
        outgoing = [
            masked(mask, u) if is_dense(where) else packed.take(u, where)
            for mask, where, u in zip(old, in_inner, outgoing, strict=True)
        ]
        inner = None
        if self.inner is not None:
            trees = (
                jax.tree.unflatten(treedef, outgoing),
                state.inner_state,
                jax.tree.unflatten(treedef, seen),
            )
            step, inner_state = self.inner.update(*trees, **extra)
            outgoing = jax.tree.leaves(step)
            inner = Inner(self.inner, state.inner_state, inner_state)

        def moved(i: int) -> Leaf:
            """What a round sees of a leaf."""
            w, grad = weights[i], dense_grads[i]
            if self.update_weights:
                w = packed.add(w, in_inner[i], outgoing[i])
            return view(i, w, sums[i] / self.grow_batches if self.grow_batches > 1 else grad)

        is_round, new, counters, plan_state = update_topology(
            self.rule,
            self.rounds,
            [path_name(path) for path, _ in layout.leaves],
            facts,
            moved,
            masks_now,
            counters,
            count,
            plan_state,
        )
        frozen = False if self.update_weights else is_round
        rest = (outgoing, weights)
        if inner is not None and self.packed:
            emitted, inner_state, where_active = emit.packed(
                old, new, is_round, frozen, where_active, *rest, seen, inner, treedef
            )
            if not as_sparse:
                emitted = [emit.dense(u, w) for u, w in zip(emitted, weights, strict=True)]
        else:
            emitted, inner_state = emit.whole(old, new, frozen, *rest, inner, treedef)
            if self.indices and is_round is not False:
                where_active = lax.cond(
                    is_round,
                    lambda: emit.new_indices(new, where_active),
                    lambda: where_active,
                )
        return jax.tree.unflatten(treedef, emitted), SparseState(
            count=count,
            key=state.key,
            masks=replace_leaves(state.masks, params, new),
            counters=replace_leaves(state.counters, params, counters),
            rule_state=remember(state.rule_state, params, kept, plan_state, sums),
            inner_state=inner_state,
            needs_dense=self.needs_dense(count + 1),
            indices=replace_leaves(state.indices, params, where_active) if self.indices else (),
        )

    def _penalised(
        self, leaf: Callable[[int], Leaf], stacks: Mapping[int, Any], grads: list[Any]
    ) -> list[Any]:
        """The gradients with the penalty's term, each layer for itself."""
        if self.penalty is None:
            return grads
        result = list(grads)
        for i, stack in stacks.items():
            seen = leaf(i)
            seen = seen._replace(key=jax.random.fold_in(seen.key, 2))
            result[i] += by_layer(self.penalty, stack)(seen).astype(grads[i].dtype)
        return result

    def _remembered(
        self, leaf: Callable[[int], Leaf], stacks: Mapping[int, Any], kept: list[Any]
    ) -> list[Any]:
        """The memories after this step, each layer for itself."""
        if self.memory is None:
            return kept
        result = list(kept)
        for i, stack in stacks.items():
            result[i] = by_layer(self.memory.update, stack)(leaf(i))
        return result

    def _add_up(self, count: jax.Array, sums: list[Any], grads: list[Any]) -> list[Any]:
        """The sums of dense gradients over the last `grow_batches` steps before a round."""
        left = self.rounds.until(count)
        wanted = [i for i, total_ in enumerate(sums) if not is_dense(total_)]

        def add() -> list[jax.Array]:
            first = left == self.grow_batches - 1
            return [
                jnp.where(first, jnp.zeros_like(sums[i]), sums[i]) + grads[i].astype(sums[i].dtype)
                for i in wanted
            ]

        new = lax.cond(left < self.grow_batches, add, lambda: [sums[i] for i in wanted])
        result = list(sums)
        for i, value in zip(wanted, new, strict=True):
            result[i] = value
        return result


def _positions(mask: jax.Array, fact: Facts | None) -> jax.Array:
    if fact is None:
        raise ValueError(
            "packed=True and indices=True need the counts of active weights when the step is "
            "compiled, and masks= is traced: make the masks outside jit and vmap."
        )
    return packed.positions(mask, int(np.max(fact.target)), fact.grid)


def _leaves_like(treedef: Any, tree: PyTree, what: str) -> list[jax.Array]:
    if jax.tree.structure(tree) != treedef:
        raise ValueError(
            f"{what} and params have different structures, {jax.tree.structure(tree)} and "
            f"{treedef}: differentiate with respect to these params."
        )
    return jax.tree.leaves(tree)
