"""What one call of `update` was given, flattened, and what a step changes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.engine.config import Config
from dstee_jax.masks.counts import LeafSpec
from dstee_jax.rules.scores import Score
from dstee_jax.rules.stacking import by_layer
from dstee_jax.state import NO_GRAD, Leaf, LeafWithoutGrad
from dstee_jax.trees import (
    PyTree,
    expanded,
    is_dense,
    leaves_with_path,
    masked,
    path_name,
)


class Carry(NamedTuple):
    """What a step changes; lists have an entry for each leaf, `MaskedNode` where it has none.

    Attributes:
      inner_state, masks, counters, plan_state: as in `SparseState`.
      places: where the active weights of packed leaves are.
      grown: as in `StepInputs`.
      params: if the step returns parameters.
      updates: if it does not, once the optimizer has made them.
      stays: before that, on the way to updates: which weights are active before and after the
        round (of packed leaves, packed).
    """

    inner_state: Any
    masks: list[Any]
    counters: list[Any]
    plan_state: Any
    places: list[Any]
    grown: list[Any]
    params: Sequence[jax.Array] = ()
    updates: Sequence[jax.Array] = ()
    stays: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What one call was given; lists have an entry for each leaf of the parameters.

    Attributes:
      config: what `transform` was asked for.
      treedef: of the parameters.
      names: of the leaves.
      specs: the counts and the cut of each, None where dense or unknown.
      full: whether all weights of a leaf are active for ever, as far as shapes tell: then its
        gradient is not masked, so that the program is the inner optimizer's bit for bit.
      key: of the state, wrapped.
      count: of this step, from 1.
      weights: the parameters.
      grads: dense gradients, None if nobody passed them.
      outgoing: what reaches the inner optimizer before it is masked: the gradients with the
        penalty's term, or the updates that came down the chain.
      masks: before the step, `MaskedNode` where dense.
      counters: as masks.
      kept: each leaf's memory; of this step, once `remembered` has made it.
      sums: of the gradients, with `grow_batches`; of this step, once `added_up` has.
      grown: with `scale`, the step at which each weight was grown; else `()` for each leaf.
      as_params: whether the step returns parameters, not updates.
      extra: arguments of the inner optimizer.
    """

    config: Config
    treedef: Any
    names: list[str]
    specs: list[LeafSpec | None]
    full: list[bool]
    key: jax.Array
    count: jax.Array
    weights: list[jax.Array]
    grads: list[Any]
    outgoing: list[jax.Array]
    masks: list[Any]
    counters: list[Any]
    kept: list[Any]
    sums: list[Any]
    grown: list[Any]
    as_params: bool
    extra: dict[str, Any]

    def tree(self, leaves: Sequence[Any]) -> PyTree:
        """A list of leaves as the parameters are."""
        return jax.tree.unflatten(self.treedef, leaves)

    @property
    def moving(self) -> list[int]:
        """Which leaves have a mask."""
        return [i for i, mask in enumerate(self.masks) if not is_dense(mask)]

    def view(
        self, i: int, weight: jax.Array, grad: Any, mask: Any, counter: Any, grown: Any = ()
    ) -> Leaf:
        """The i-th leaf as scores see it."""
        spec = self.specs[i]
        return (Leaf if grad is not None else LeafWithoutGrad)(
            param=masked(mask, weight),
            grad=grad,
            mask=expanded(mask, weight.shape),
            counter=expanded(counter, weight.shape),
            key=jax.random.fold_in(jax.random.fold_in(self.key, self.count), i),
            count=self.count,
            rule_state=self.kept[i],
            target=None if spec is None else spec.of_layer(weight.shape),
            grown=() if self.config.scale is None else expanded(grown, weight.shape),
        )

    def _each(self, score: Score, number: int | None = None) -> dict[int, jax.Array]:
        """A score of every leaf with a mask, before the step; each layer for itself."""
        found = {}
        for i in self.moving:
            seen = self.weights[i], self.grads[i], self.masks[i], self.counters[i], self.grown[i]
            spec, leaf = self.specs[i], self.view(i, *seen)
            if number is not None:
                leaf = leaf._replace(key=jax.random.fold_in(leaf.key, number))
            found[i] = by_layer(score, () if spec is None else spec.stack)(leaf)
        return found

    def penalised(self) -> list[Any]:
        """What goes out, with the penalty's term."""
        if self.config.penalty is None:
            return self.outgoing
        terms = self._each(self.config.penalty, 2)
        return [
            grad + terms[i].astype(grad.dtype) if i in terms else grad
            for i, grad in enumerate(self.outgoing)
        ]

    def scaled(self, updates: list[Any], weights: Sequence[jax.Array], now: Carry) -> list[Any]:
        """The updates of leaves with a mask, by the scale; `now` before the step."""
        scale, scaled = self.config.scale, list(updates)
        if scale is None:
            return updates

        def of_leaf(leaf: Leaf) -> jax.Array:
            return jnp.broadcast_to(scale(leaf), leaf.param.shape)

        for i in self.moving:
            spec, kept = self.specs[i], (now.masks[i], now.counters[i], now.grown[i])
            leaf = self.view(i, weights[i], self.grads[i], *kept)
            leaf = leaf._replace(key=jax.random.fold_in(leaf.key, 3))
            factor = by_layer(of_leaf, () if spec is None else spec.stack)(leaf)
            scaled[i] = updates[i] * factor.astype(updates[i].dtype)
        return scaled

    def remembered(self) -> list[Any]:
        """The memories after this step."""
        if self.config.memory is None:
            return self.kept
        new = self._each(self.config.memory.update)
        return [new.get(i, kept) for i, kept in enumerate(self.kept)]

    def added_up(self) -> list[Any]:
        """The sums of dense gradients over the last `grow_batches` steps before a round."""
        batches = self.config.grow_batches
        if batches == 1:
            return self.sums
        if any(grad is None for grad in self.grads):
            raise ValueError(f"grow_batches={batches} sums gradients: {NO_GRAD}")
        left = self.config.rounds.until(self.count)
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


def leaves_like(params: PyTree, tree: PyTree, what: str) -> list[jax.Array]:
    """The leaves of a tree that must fit the parameters: structure, shapes, real numbers."""
    treedef: Any = jax.tree.structure(params)
    if jax.tree.structure(tree) != treedef:
        raise ValueError(
            f"{what} and params have different structures, {jax.tree.structure(tree)} and "
            f"{treedef}: differentiate with respect to these params."
        )
    leaves = jax.tree.leaves(tree)
    paths = [path for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    for path, leaf, param in zip(paths, leaves, jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(param):
            raise ValueError(
                f"{what} of {path_name(path)} has shape {jnp.shape(leaf)}, the parameter "
                f"{jnp.shape(param)}: average gradients of single examples or devices over their "
                "axis first."
            )
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        of_param = jnp.result_type(param)
        if jnp.issubdtype(of_param, jnp.floating) and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{what} of {path_name(path)} has dtype {dtype.name}, the parameter "
                f"{of_param.name}: differentiate a real loss with respect to these params."
            )
    return leaves
