"""One round over all leaves: counts, new masks and counters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dstee_jax.masks.counts import Facts, total
from dstee_jax.rules.plans import Plan, Round
from dstee_jax.rules.schedule import Rounds
from dstee_jax.rules.scores import Score
from dstee_jax.rules.stacking import by_layer
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.drop_and_grow import Selection, exchange
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf, LeafWithoutGrad
from dstee_jax.trees import is_dense

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


def is_mask_step(
    rule: Rule, rounds: Rounds, facts: list[Facts | None], masks: list[Any], count: jax.Array
) -> Any:
    """Whether step `count` is a mask step: bool, shape (); False itself if no step can be one."""
    sparse = [i for i, mask in enumerate(masks) if not is_dense(mask)]
    # Masks of unknown counts are traced ones, which never change.
    known = [(fact, masks[i].size) for i in sparse if (fact := facts[i]) is not None]
    movable = len(known) == len(sparse) and any(0 < total(f.target) < size for f, size in known)
    fixed = rule.plan.exchanges
    if not movable or not rounds.every or (fixed and rounds.highest <= 0):
        return False
    due = rounds.is_round(count)
    return due & (rounds.k(1, count) > 0) if fixed else due


def update_topology(
    rule: Rule,
    rounds: Rounds,
    names: list[str],
    facts: list[Facts],
    leaf: Callable[[int], Leaf],
    count: jax.Array,
    plan_state: Any,
    due: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], Any]:
    """A round over all sparse leaves.

    Args:
      rule: what to do with a leaf.
      rounds: how many weights move.
      names: of each leaf; leaves of equal shape whose names differ in numbers only are exchanged
        by one program.
      facts: of each leaf.
      leaf: makes what the scores see of the j-th one.
      count: int32 scalar, the step, from 1.
      plan_state: what the plan keeps.
      due: whether this is a mask step, which the caller has asked already: what is made within
        the `lax.cond` of a group of leaves leaves its memory to the next group.

    Returns:
      `(masks, counters, plan_state)`. A leaf without free places keeps its mask and still
      counts the round.
    """
    fixed = rule.plan.exchanges
    leaves = [leaf(j) for j in range(len(names))]
    drop_scores = list(map(functools.partial(rule.score, 0), leaves, facts))
    drops, grows, plan_state = rule.plan.amounts(
        Round(
            leaves=leaves,
            drop_scores=drop_scores,
            targets=[fact.target for fact in facts],
            starts=[fact.start for fact in facts],
            fraction=jnp.asarray(rounds.fraction(count), jnp.float32),
            number=rounds.number(count),
            time=count.astype(jnp.float32) / rounds.total_steps,
            is_last=rounds.is_last(count),
            regrow=rule.regrow,
            state=plan_state,
        )
    )

    def k_max(fact: Facts, size: int) -> int:
        if not fixed:
            return size
        return rounds.k_max(int(np.max(fact.target))) if 0 < total(fact.target) < size else 0

    def row(j: int) -> Row:
        view, fact = leaf(j), facts[j]  # made again: within the cond
        return Row(
            view.mask,
            rule.score(0, view, fact) if fixed else drop_scores[j],
            rule.score(1, view, fact),
            drops[j],
            None if fixed else grows[j],
            k_max(fact, view.mask.size),
            fact,
        )

    masks, counters = [view.mask for view in leaves], [view.counter for view in leaves]
    for group in _alike(names, leaves, facts, rule):

        def round_(group: list[int] = group) -> list[tuple[jax.Array, jax.Array]]:
            new = rule.exchange_alike([row(j) for j in group])
            return [(mask, _add(rule, leaves[j], mask)) for j, mask in zip(group, new, strict=True)]

        def keep(group: list[int] = group) -> list[tuple[jax.Array, jax.Array]]:
            return [(masks[j], counters[j]) for j in group]

        for j, changed in zip(group, lax.cond(due, round_, keep), strict=True):
            masks[j], counters[j] = changed
    return masks, counters, plan_state


def at_most_once(due: jax.Array, function: Callable[..., Any], carry: Any) -> Any:
    """`function(due, carry)` if `due`, else `carry`.

    A loop of no or one round: XLA updates in place what a loop carries, if `function` reads it
    from its argument; what the branches of a `lax.cond` pass through it copies (on CPU, on every
    step). The cond in the loop keeps XLA from moving work that is the same in all rounds out.
    """

    def once(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        due, carry = loop
        return due & False, lax.cond(due, lambda x: function(due, x), lambda x: x, carry)

    return lax.while_loop(lambda loop: loop[0], once, (due, carry))[1]


def _alike(names: list[str], leaves: list[Leaf], facts: list[Facts], rule: Rule) -> list[list[int]]:
    """Indices of the leaves in groups that can be stacked: of one shape and, by name, one role.

    Numbers in a name do not count: 'layers/3/query' and 'layers/4/query' lie on devices in the
    same way; 'layers/3/out' may have their shape and lie in another, which would be gathered.
    """
    groups: dict[Hashable, list[int]] = {}
    for j, (name, leaf, fact) in enumerate(zip(names, leaves, facts, strict=True)):
        whole = total(fact.target) in (0, leaf.mask.size)
        alone = not rule.plan.exchanges or rule.structure is not None or whole
        seen = [leaf.mask, leaf.param]
        seen += [] if isinstance(leaf, LeafWithoutGrad) else [leaf.grad]
        arrays = [(x.shape, x.dtype, sharding_of(x)) for x in seen]
        kind = (re.sub(r"\d+", "", name), *arrays, fact.grid)
        groups.setdefault(j if alone else kind, []).append(j)
    few = [group for group in groups.values() if len(group) < STACK_FROM]
    return [g for g in groups.values() if len(g) >= STACK_FROM] + [[j] for g in few for j in g]


def _add(rule: Rule, leaf: Leaf, new: jax.Array) -> jax.Array:
    """The counter with this round in it; it saturates."""
    seen = new if rule.counter_update == "new" else leaf.mask
    room = leaf.counter < jnp.iinfo(leaf.counter.dtype).max
    return leaf.counter + (seen & room).astype(leaf.counter.dtype)
