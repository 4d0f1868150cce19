"""One round of drop-and-grow over all leaves, under one `lax.cond`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.schedule import Rounds
from dstee_jax.scores import Score
from dstee_jax.selection import Selection, drop_and_grow
from dstee_jax.state import Leaf, is_dense


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a round turns a leaf's mask and counter into new ones: two scores and two switches."""

    drop: Score
    grow: Score
    regrow: bool
    counter_update: str
    selection: Selection

    def __call__(self, leaf: Leaf, k: jax.Array, k_max: int) -> tuple[jax.Array, jax.Array]:
        """New mask (bool) and counter (unsigned) of one leaf, from k, an int32 scalar."""
        mask = drop_and_grow(
            leaf.mask,
            self.drop(leaf._replace(key=jax.random.fold_in(leaf.key, 0))),
            self.grow(leaf._replace(key=jax.random.fold_in(leaf.key, 1))),
            k,
            k_max=k_max,
            regrow=self.regrow,
            selection=self.selection,
        )
        seen = mask if self.counter_update == "new" else leaf.mask
        room = leaf.counter < jnp.iinfo(leaf.counter.dtype).max
        return mask, leaf.counter + (seen & room).astype(leaf.counter.dtype)


def update_topology(
    rule: Rule,
    rounds: Rounds,
    counts: list[int | None],
    leaf: Callable[[int], Leaf],
    masks: list[Any],
    counters: list[Any],
    count: jax.Array,
) -> tuple[Any, list[Any], list[Any]]:
    """Run a round over all leaves if this step is a mask step.

    Args:
      rule: what to do with a leaf.
      rounds: which steps are mask steps, and how many weights move.
      counts: static number of active weights of each leaf, None where dense.
      leaf: makes the i-th leaf's view for the scores; called in the mask step's branch only.
      masks: bool array or `MaskedNode` for each leaf.
      counters: unsigned array or `MaskedNode` for each leaf.
      count: int32 scalar, the step, from 1.

    Returns:
      `(is_round, masks, counters)`. `is_round` is False (a Python bool) if no step of the run
      can be a mask step. A leaf without free places keeps its mask and still counts the round.
    """
    sparse = [i for i, mask in enumerate(masks) if not is_dense(mask)]
    movable = [i for i in sparse if counts[i] and counts[i] < masks[i].size]
    if not movable or not rounds.every or rounds.highest <= 0:
        return False, masks, counters

    def round_() -> list[tuple[jax.Array, jax.Array]]:
        changed = []
        for i in sparse:
            active = counts[i] or 0
            k_max = rounds.k_max(active) if i in movable else 0
            changed.append(rule(leaf(i), rounds.k(active, count), k_max))
        return changed

    def keep() -> list[tuple[jax.Array, jax.Array]]:
        return [(masks[i], counters[i]) for i in sparse]

    is_round = rounds.is_round(count) & (rounds.k(1, count) > 0)
    changed = dict(zip(sparse, lax.cond(is_round, round_, keep), strict=True))
    new_masks = [changed[i][0] if i in changed else mask for i, mask in enumerate(masks)]
    new_counters = [changed[i][1] if i in changed else n for i, n in enumerate(counters)]
    return is_round, new_masks, new_counters
