"""What one call of `update` was given, flattened, and a round over it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from dstee_jax.engine.config import Sparse
from dstee_jax.engine.packed import new_indices
from dstee_jax.engine.round import update_topology
from dstee_jax.masks.counts import Facts
from dstee_jax.rules.scores import Score
from dstee_jax.rules.stacking import by_layer
from dstee_jax.state import NO_GRAD, Leaf, LeafWithoutGrad
from dstee_jax.trees import PyTree, is_dense, masked


class Changing(NamedTuple):
    """What a step changes; lists have an entry for each leaf, `MaskedNode` where it has none.

    Attributes:
      masks, counters, plan_state, indices, inner_state: as in `SparseState`.
      emitted: of packed leaves, the updates or the parameters, whole.
    """

    masks: list[Any]
    counters: list[Any]
    plan_state: Any
    indices: list[Any]
    inner_state: Any = ()
    emitted: Any = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call was given; lists have an entry for each leaf of the parameters.

    Attributes:
      sparse: what `transform` was asked for.
      treedef: of the parameters.
      names: of the leaves.
      facts: the counts and the cut of each, None where dense or unknown.
      full: whether a leaf's mask is all ones for ever.
      key: of the state.
      count: of this step, from 1.
      weights: the parameters.
      grads: dense gradients, None if nobody passed them.
      masks: before the step, `MaskedNode` where dense.
      counters: as masks.
      kept: each leaf's memory; of this step, once `remembered` has made it.
      sums: of the gradients, with `grow_batches`; of this step, once `added_up` has.
    """

    sparse: Sparse
    treedef: Any
    names: list[str]
    facts: list[Facts | None]
    full: list[bool]
    key: jax.Array
    count: jax.Array
    weights: list[jax.Array]
    grads: list[Any]
    masks: list[Any]
    counters: list[Any]
    kept: list[Any]
    sums: list[Any]

    def tree(self, leaves: list[Any]) -> PyTree:
        """A list of leaves as the parameters are."""
        return jax.tree.unflatten(self.treedef, leaves)

    @property
    def moving(self) -> list[int]:
        """Which leaves have a mask."""
        return [i for i, mask in enumerate(self.masks) if not is_dense(mask)]

    def view(self, i: int, weight: jax.Array, grad: Any, mask: Any, counter: Any) -> Leaf:
        """The i-th leaf as scores see it."""
        facts = self.facts[i]
        return (Leaf if grad is not None else LeafWithoutGrad)(
            param=masked(mask, weight),
            grad=grad,
            mask=mask,
            counter=counter,
            key=jax.random.fold_in(jax.random.fold_in(self.key, self.count), i),
            count=self.count,
            rule_state=self.kept[i],
            target=None if facts is None else facts.of_layer(weight.shape),
        )

    def weight_seen(self, i: int, update: jax.Array) -> jax.Array:
        """What a round sees of the i-th leaf: its weights before the update, or after it."""
        weight = self.weights[i]
        return optax.apply_updates(weight, update) if self.sparse.update_weights else weight

    def _each(self, score: Score, number: int | None = None) -> dict[int, jax.Array]:
        """A score of every leaf with a mask, before the step; each layer for itself."""
        found = {}
        for i in self.moving:
            seen = self.weights[i], self.grads[i], self.masks[i], self.counters[i]
            facts, leaf = self.facts[i], self.view(i, *seen)
            if number is not None:
                leaf = leaf._replace(key=jax.random.fold_in(leaf.key, number))
            found[i] = by_layer(score, () if facts is None else facts.stack)(leaf)
        return found

    def penalised(self, grads: list[Any]) -> list[Any]:
        """The gradients with the penalty's term."""
        if self.sparse.penalty is None:
            return grads
        terms = self._each(self.sparse.penalty, 2)
        return [
            grad + terms[i].astype(grad.dtype) if i in terms else grad
            for i, grad in enumerate(grads)
        ]

    def remembered(self) -> list[Any]:
        """The memories after this step."""
        if self.sparse.memory is None:
            return self.kept
        new = self._each(self.sparse.memory.update)
        return [new.get(i, kept) for i, kept in enumerate(self.kept)]

    def added_up(self) -> list[Any]:
        """The sums of dense gradients over the last `grow_batches` steps before a round."""
        batches = self.sparse.grow_batches
        if batches == 1:
            return self.sums
        if any(grad is None for grad in self.grads):
            raise ValueError(f"grow_batches={batches} sums gradients: {NO_GRAD}")
        left = self.sparse.rounds.until(self.count)
        wanted = [i for i, sum_ in enumerate(self.sums) if not is_dense(sum_)]

        def add() -> list[jax.Array]:
            first = left == batches - 1
            return [
                jnp.where(first, jnp.zeros_like(self.sums[i]), self.sums[i])
                + self.grads[i].astype(self.sums[i].dtype)
                for i in wanted
            ]

        new = lax.cond(left < batches, add, lambda: [self.sums[i] for i in wanted])
        result = list(self.sums)
        for i, value in zip(wanted, new, strict=True):
            result[i] = value
        return result

    def round(self, due: jax.Array, now: Changing, weight: Callable[[int], jax.Array]) -> Changing:
        """The masks, counters and indices after a round.

        Args:
          due: True, as `update_topology` has it.
          now: before it.
          weight: gives the i-th leaf's weights.
        """
        moving, batches = self.moving, self.sparse.grow_batches

        def leaf(j: int) -> Leaf:
            i = moving[j]
            grad = self.sums[i] / batches if batches > 1 else self.grads[i]
            return self.view(i, weight(i), grad, now.masks[i], now.counters[i])

        masks, counters, plan_state = update_topology(
            self.sparse.rule,
            self.sparse.rounds,
            [self.names[i] for i in moving],
            [fact for i in moving if (fact := self.facts[i]) is not None],
            leaf,
            self.count,
            now.plan_state,
            due,
        )
        new_masks, new_counters = list(now.masks), list(now.counters)
        for i, mask, counter in zip(moving, masks, counters, strict=True):
            new_masks[i], new_counters[i] = mask, counter
        return now._replace(
            masks=new_masks,
            counters=new_counters,
            plan_state=plan_state,
            indices=new_indices(new_masks, now.indices),
        )


def leaves_like(treedef: Any, tree: PyTree, what: str) -> list[jax.Array]:
    if jax.tree.structure(tree) != treedef:
        raise ValueError(
            f"{what} and params have different structures, {jax.tree.structure(tree)} and "
            f"{treedef}: differentiate with respect to these params."
        )
    return jax.tree.leaves(tree)
