"""One round over all leaves: counts, new masks and counters, behind one `lax.cond`."""

import dataclasses
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dstee_jax.counts import Facts, total
from dstee_jax.parts import sharding_of
from dstee_jax.plans import Plan, Round
from dstee_jax.schedule import Rounds
from dstee_jax.scores import Score
from dstee_jax.selection import Selection, exchange
from dstee_jax.stacking import by_layer
from dstee_jax.state import Leaf, is_dense
from dstee_jax.structures import Structure

# Leaves that are alike share a program from this many on: it compiles once, and copies them.
STACK_FROM = 8


class Row(NamedTuple):
    """What one leaf exchanges in a round; see `selection.exchange`."""

    mask: jax.Array
    drop_score: jax.Array
    grow_score: jax.Array
    k_drop: Any
    k_grow: Any
    k_max: int
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a round turns masks and counters into new ones."""

    drop: Score
    grow: Score
    plan: Plan
    structure: Structure | None
    regrow: bool
    counter_update: str
    selection: Selection

    def score(self, which: int, leaf: Leaf, facts: Facts) -> jax.Array:
        """The drop score (0) or the grow score (1) of a leaf, each layer for itself."""
        score = (self.drop, self.grow)[which]
        leaf = leaf._replace(key=jax.random.fold_in(leaf.key, which))
        return by_layer(score, facts.stack)(leaf)

    def exchange(self, row: Row) -> jax.Array:
        """The new mask of one leaf."""
        if self.structure is not None:
            return self._within_structure(row)
        return exchange(
            *row[:5],
            row.facts.grid,
            k_max=row.k_max,
            regrow=self.regrow,
            selection=self.selection,
        )

    def exchange_alike(self, rows: list[Row]) -> list[jax.Array]:
        """The new masks of leaves that are alike: one program, as layers of a stacked leaf."""
        if len(rows) == 1:
            return [self.exchange(rows[0])]
        parts = [parts for parts in rows[0].facts.grid if parts > 1]
        k = jnp.stack([jnp.broadcast_to(row.k_drop, parts) for row in rows])
        arrays = [jnp.stack(column) for column in zip(*(row[:3] for row in rows), strict=True)]
        grid = (len(rows), *rows[0].facts.grid)
        facts = rows[0].facts._replace(grid=grid)
        one = Row(arrays[0], arrays[1], arrays[2], k, None, max(r.k_max for r in rows), facts)
        return list(self.exchange(one))

    def _within_structure(self, row: Row) -> jax.Array:
        structure = self.structure
        assert structure is not None

        def one(mask: jax.Array, drop: jax.Array, grow: jax.Array, k: jax.Array) -> jax.Array:
            return structure.exchange(mask, drop, grow, k, row.k_max, self.regrow, self.selection)

        for i, axis in enumerate(row.facts.stack):
            one = jax.vmap(one, in_axes=(axis, axis, axis, i), out_axes=axis)
        k = jnp.broadcast_to(jnp.asarray(row.k_drop), np.shape(row.facts.target))
        return one(row.mask, row.drop_score, row.grow_score, k)


def update_topology(
    rule: Rule,
    rounds: Rounds,
    names: list[str],
    facts: list[Facts | None],
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
      names: of each leaf; leaves of equal shape whose names differ in numbers only are exchanged
        by one program.
      facts: of each leaf, None where dense (or where masks are fixed and unknown).
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
    known = [fact for fact in (facts[i] for i in sparse) if fact is not None]
    sizes = [masks[i].size for i in sparse]
    fixed = rule.plan.exchanges
    goals = [total(fact.target) for fact in known]
    # Masks of unknown counts are traced ones, which never change.
    movable = len(known) == len(sparse) and any(
        0 < n < size for n, size in zip(goals, sizes, strict=True)
    )
    if not movable or not rounds.every or (fixed and rounds.highest <= 0):
        return False, masks, counters, plan_state

    def k_max(fact: Facts, size: int) -> int:
        if not fixed:
            return size
        return rounds.k_max(int(np.max(fact.target))) if 0 < total(fact.target) < size else 0

    def round_() -> tuple[list[tuple[jax.Array, jax.Array]], Any]:
        leaves = [leaf(i) for i in sparse]
        drop_scores = [rule.score(0, *pair) for pair in zip(leaves, known, strict=True)]
        drops, grows, state = rule.plan.amounts(
            Round(
                leaves=leaves,
                drop_scores=drop_scores,
                targets=[fact.target for fact in known],
                starts=[fact.start for fact in known],
                fraction=jnp.asarray(rounds.fraction(count), jnp.float32),
                number=rounds.number(count),
                time=count.astype(jnp.float32) / rounds.total_steps,
                is_last=rounds.is_last(count),
                regrow=rule.regrow,
                state=plan_state,
            )
        )
        rows = [
            Row(
                view.mask,
                score,
                rule.score(1, view, fact),
                k,
                None if fixed else k_grow,
                k_max(fact, size),
                fact,
            )
            for view, score, fact, size, k, k_grow in zip(
                leaves, drop_scores, known, sizes, drops, grows, strict=True
            )
        ]
        new: list[Any] = [None] * len(rows)
        for group in _alike([names[i] for i in sparse], rows, rule):
            for j, mask in zip(group, rule.exchange_alike([rows[j] for j in group]), strict=True):
                new[j] = mask
        return [(m, _add(rule, view, m)) for m, view in zip(new, leaves, strict=True)], state

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


def _alike(names: list[str], rows: list[Row], rule: Rule) -> list[list[int]]:
    """Indices of the rows in groups that can be stacked: of one shape and, by name, one role.

    Numbers in a name do not count: 'layers/3/query' and 'layers/4/query' lie on devices in the
    same way; 'layers/3/out' may have their shape and lie in another, which would be gathered.
    """
    groups: dict[Hashable, list[int]] = {}
    for j, (name, row) in enumerate(zip(names, rows, strict=True)):
        alone = not rule.plan.exchanges or rule.structure is not None or row.k_max == 0
        arrays = [(x.shape, x.dtype, sharding_of(x)) for x in row[:3]]
        kind = (re.sub(r"\d+", "", name), *arrays, row.facts.grid)
        groups.setdefault(j if alone else kind, []).append(j)
    few = [group for group in groups.values() if len(group) < STACK_FROM]
    return [g for g in groups.values() if len(g) >= STACK_FROM] + [[j] for g in few for j in g]


def _add(rule: Rule, leaf: Leaf, new: jax.Array) -> jax.Array:
    """The counter with this round in it; it saturates."""
    seen = new if rule.counter_update == "new" else leaf.mask
    room = leaf.counter < jnp.iinfo(leaf.counter.dtype).max
    return leaf.counter + (seen & room).astype(leaf.counter.dtype)
