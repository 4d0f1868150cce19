"""One round over all leaves: counts, new masks and counters, behind one `lax.cond`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.memory import Memory
from dstee_jax.plans import Plan, Round
from dstee_jax.schedule import Rounds
from dstee_jax.scores import Score
from dstee_jax.selection import Selection, drop_and_grow
from dstee_jax.state import Leaf, is_dense
from dstee_jax.structures import Structure


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a round turns masks and counters into new ones."""

    drop: Score
    grow: Score
    plan: Plan
    memory: Memory | None
    structure: Structure | None
    regrow: bool
    counter_update: str
    selection: Selection

    def drop_score(self, leaf: Leaf) -> jax.Array:
        return self.drop(leaf._replace(key=jax.random.fold_in(leaf.key, 0)))

    def change(
        self, leaf: Leaf, drop_score: jax.Array, k_drop: Any, k_grow: Any, k_max: int
    ) -> tuple[jax.Array, jax.Array]:
        """New mask (bool) and counter (unsigned) of one leaf."""
        grow_score = self.grow(leaf._replace(key=jax.random.fold_in(leaf.key, 1)))
        if self.structure is not None:
            mask = self.structure.exchange(
                leaf.mask, drop_score, grow_score, k_drop, k_max, self.regrow, self.selection
            )
        else:
            mask = drop_and_grow(
                leaf.mask,
                drop_score,
                grow_score,
                k_drop,
                k_max=k_max,
                k_grow=None if self.plan.exchanges else k_grow,
                regrow=self.regrow,
                selection=self.selection,
            )
        seen = mask if self.counter_update == "new" else leaf.mask
        room = leaf.counter < jnp.iinfo(leaf.counter.dtype).max
        return mask, leaf.counter + (seen & room).astype(leaf.counter.dtype)


def update_topology(
    rule: Rule,
    rounds: Rounds,
    targets: list[int | None],
    starts: list[int | None],
    leaf: Callable[[int], Leaf],
    masks: list[Any],
    counters: list[Any],
    count: jax.Array,
    plan_state: Any,
) -> tuple[Any, list[Any], list[Any], Any]:
    """Run a round over all leaves if this step is a mask step.

    Args:
      rule: what to do with a leaf.
      rounds: which steps are mask steps, and how many weights move.
      targets: static number of active weights of each leaf at the asked sparsity, None where
        dense.
      starts: the same at step 0.
      leaf: makes the i-th leaf's view for the scores; called in the mask step's branch only.
      masks: bool array or `MaskedNode` for each leaf.
      counters: unsigned array or `MaskedNode` for each leaf.
      count: int32 scalar, the step, from 1.
      plan_state: what the plan keeps.

    Returns:
      `(is_round, masks, counters, plan_state)`. `is_round` is False (a Python bool) if no step
      of the run can be a mask step. A leaf without free places keeps its mask and still counts
      the round.
    """
    sparse = [i for i, mask in enumerate(masks) if not is_dense(mask)]
    goals = [targets[i] or 0 for i in sparse]
    sizes = [masks[i].size for i in sparse]
    fixed = rule.plan.exchanges
    movable = any(0 < n < size for n, size in zip(goals, sizes, strict=True))
    if not movable or not rounds.every or (fixed and rounds.highest <= 0):
        return False, masks, counters, plan_state

    def k_max(goal: int, size: int) -> int:
        if not fixed:
            return size
        return rounds.k_max(goal) if 0 < goal < size else 0

    def round_() -> tuple[list[tuple[jax.Array, jax.Array]], Any]:
        leaves = [leaf(i) for i in sparse]
        drop_scores = [rule.drop_score(view) for view in leaves]
        drops, grows, state = rule.plan.amounts(
            Round(
                leaves=leaves,
                drop_scores=drop_scores,
                targets=goals,
                starts=[starts[i] or 0 for i in sparse],
                fraction=jnp.asarray(rounds.fraction(count), jnp.float32),
                number=rounds.number(count),
                time=count.astype(jnp.float32) / rounds.total_steps,
                is_last=rounds.is_last(count),
                regrow=rule.regrow,
                state=plan_state,
            )
        )
        bounds = [k_max(goal, size) for goal, size in zip(goals, sizes, strict=True)]
        rows = zip(leaves, drop_scores, drops, grows, bounds, strict=True)
        return [rule.change(*row) for row in rows], state

    def keep() -> tuple[list[tuple[jax.Array, jax.Array]], Any]:
        return [(masks[i], counters[i]) for i in sparse], plan_state

    is_round = rounds.is_round(count)
    if fixed:
        is_round &= rounds.k(1, count) > 0
    changed, plan_state = lax.cond(is_round, round_, keep)
    new_masks, new_counters = list(masks), list(counters)
    for i, (mask, counter) in zip(sparse, changed, strict=True):
        new_masks[i], new_counters[i] = mask, counter
    return is_round, new_masks, new_counters, plan_state
