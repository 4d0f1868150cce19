"""One round over all leaves: counts, new masks and counters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine.alike import alike, stacked, unstacked
from dstee_jax.engine.config import Config
from dstee_jax.engine.inputs import Carry, StepInputs
from dstee_jax.engine.packing import renewed
from dstee_jax.engine.rule import Rule
from dstee_jax.masks.counts import LeafSpec, total
from dstee_jax.rules.plans import Round
from dstee_jax.selection.exchange import Exchange, exchange
from dstee_jax.state import Leaf
from dstee_jax.trees import is_dense

# Bytes of keys on a device that are searched together; beyond it a round searches group by group.
# 1 GiB holds the keys of 256 million weights: any network that trains on one device without
# sharding, beside optimizer states of more than twice that size.
KEYS_AT_ONCE = 2**30


def is_mask_step(config: Config, count: jax.Array) -> Any:
    """Whether step `count` is a mask step: bool, shape (); a Python bool if count is not traced."""
    due = config.rounds.is_round(count)
    if config.rule.plan.exchanges:
        due &= config.rounds.k(1, count) > 0
    return due if isinstance(due, jax.core.Tracer) else bool(due)


def run_round(inputs: StepInputs, due: jax.Array | bool, now: Carry) -> Carry:
    """The masks, counters and places after a round.

    A leaf without free places keeps its mask and still counts the round.

    Args:
      inputs: what the step was given.
      due: True, perhaps traced: the caller has asked already.
      now: before the round.
    """
    config, batches = inputs.config, inputs.config.grow_batches
    moving = [i for i in inputs.moving if inputs.specs[i] is not None]

    def view(i: int) -> Leaf:
        grad = inputs.sums[i] / batches if batches > 1 else inputs.grads[i]
        weight = now.params[i] if now.params else inputs.weights[i]
        if now.updates:
            weight = optax.apply_updates(weight, now.updates[i])
        return inputs.view(i, weight, grad, now.masks[i], now.counters[i], now.grown[i])

    specs = {i: spec for i in moving if (spec := inputs.specs[i]) is not None}
    amounts, plan_state = _amounts(inputs, specs, view, now.plan_state)
    masks, counters = list(now.masks), list(now.counters)
    for group in _groups(moving, now.masks, KEYS_AT_ONCE):
        views = [view(i) for i in group]
        pairs = zip(group, views, strict=True)
        rows = [_row(config, specs[i], leaf, *amounts[i]) for i, leaf in pairs]
        for i, mask in zip(group, _exchange(inputs, due, group, rows), strict=True):
            masks[i], counters[i] = mask, _add(config.rule, masks[i], counters[i], mask)
    if config.rule.plan.trim is not None:
        masks = _trimmed(inputs, masks, [drop for drop, _ in amounts.values()])
        for i in moving:
            counters[i] = _add(config.rule, now.masks[i], now.counters[i], masks[i])
    grown = list(now.grown)
    if config.scale is not None:
        for i in moving:
            grown[i] = jnp.where(masks[i] & ~now.masks[i], inputs.count, grown[i])
    return now._replace(
        masks=masks,
        counters=counters,
        plan_state=plan_state,
        places=renewed(masks, now.places),
        grown=grown,
    )


def _amounts(
    inputs: StepInputs,
    specs: dict[int, LeafSpec],
    view: Callable[[int], Leaf],
    plan_state: Any,
) -> tuple[dict[int, tuple[Any, Any]], Any]:
    """How many weights each leaf drops and grows, and the plan's new state."""
    rule, rounds, count = inputs.config.rule, inputs.config.rounds, inputs.count
    leaves = {i: view(i) for i in specs}
    drops, grows, plan_state = rule.plan.amounts(
        Round(
            leaves=list(leaves.values()),
            drop_scores=[rule.score(0, leaf, specs[i]) for i, leaf in leaves.items()],
            grow_scores=lambda: [rule.score(1, leaf, specs[i]) for i, leaf in leaves.items()],
            targets=[spec.target for spec in specs.values()],
            starts=[spec.start for spec in specs.values()],
            fraction=jnp.asarray(rounds.fraction(count), jnp.float32),
            number=rounds.number(count),
            time=count.astype(jnp.float32) / rounds.total_steps,
            is_last=rounds.is_last(count),
            regrow=rule.regrow,
            state=plan_state,
        )
    )
    rows = zip(specs, drops, grows, strict=True)
    return {i: (k, None if rule.plan.exchanges else grow) for i, k, grow in rows}, plan_state


def _trimmed(inputs: StepInputs, masks: list[Any], drops: list[Any]) -> list[Any]:
    """What the plan's `trim` leaves of the masks, if the round drops anything."""
    trim = inputs.config.rule.plan.trim
    assert trim is not None
    dropping = jnp.any(jnp.stack([jnp.asarray(drop) for drop in drops]) > 0)
    pairs = zip(masks, trim(inputs.names, masks), strict=True)
    return [m if is_dense(m) else m & (left | ~dropping) for m, left in pairs]


def _row(config: Config, spec: LeafSpec, leaf: Leaf, k: Any, k_grow: Any) -> Exchange:
    """What a leaf exchanges."""
    size, k_max = leaf.mask.size, leaf.mask.size
    if config.rule.plan.exchanges:
        movable = 0 < total(spec.target) < size
        k_max = config.rounds.k_max(int(np.max(spec.target))) if movable else 0
    scores = [config.rule.score(which, leaf, spec) for which in (0, 1)]
    return Exchange(leaf.mask, scores[0], scores[1], spec.grid, k, k_grow, k_max)


def _exchange(
    inputs: StepInputs, due: jax.Array | bool, group: list[int], rows: list[Exchange]
) -> list[jax.Array]:
    """New masks of some leaves, by one search for what is dropped and what grows."""
    rule, names = inputs.config.rule, [inputs.names[i] for i in group]
    pairs = [(row, spec) for row, i in zip(rows, group, strict=True) if (spec := inputs.specs[i])]
    if rule.searches_alone:
        return [rule.exchange_alone(*p, name) for p, name in zip(pairs, names, strict=True)]
    reduced = [rule.reduce(*pair, inputs.count) for pair in pairs]
    places = alike(names, reduced)
    stacks = [[reduced[j] for j in part] for part in places]
    new = exchange(list(map(stacked, stacks)), regrow=rule.regrow, selection=rule.selection)
    masks: dict[int, jax.Array] = {}
    for part, stack, mask in zip(places, stacks, new, strict=True):
        masks.update(zip(part, unstacked(mask, stack, due), strict=True))
    return [rule.expand(masks[j], *pair) for j, pair in enumerate(pairs)]


def _groups(moving: list[int], masks: list[Any], limit: int) -> list[list[int]]:
    """Leaves whose keys are searched at once, in order: at most `limit` bytes on a device."""
    groups: list[list[int]] = [[]]
    used = 0
    for i in moving:
        mine = 4 * masks[i].size // _devices(masks[i])
        if groups[-1] and used + mine > limit:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += mine
    return groups


def _devices(x: jax.Array) -> int:
    """Over how many devices the type of x says that it is split; 1 under Auto mesh axes."""
    place = jax.typeof(x).sharding
    names = [name for axis in place.spec for name in (axis if isinstance(axis, tuple) else (axis,))]
    return functools.reduce(lambda n, name: n * place.mesh.shape[name], filter(None, names), 1)


def _add(rule: Rule, old: jax.Array, counter: jax.Array, new: jax.Array) -> jax.Array:
    """The counter with this round in it; it saturates."""
    seen = new if rule.counter_update == "new" else old
    dtype = counter.dtype
    room = counter < jnp.array(jnp.iinfo(dtype).max, dtype)
    return counter + (seen & room).astype(dtype)
