"""Plans: how many weights each leaf drops and grows in a round.

A plan is a function of the whole round, where a score is one of a leaf. `exchange`, the
default, keeps the count of every leaf. The others move counts between leaves under a fixed
total, or change the total over time; they combine with any drop and grow score. Their counts
are traced, so a mask update costs the same, whatever they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dstee_jax.arguments import check_function, check_number, check_whole
from dstee_jax.rules import counting
from dstee_jax.rules.counting import Counts, apportion
from dstee_jax.rules.schedule import portion
from dstee_jax.rules.scores import Score
from dstee_jax.state import Leaf

__all__ = [
    "Plan",
    "Round",
    "adaptive_threshold",
    "apportion",
    "below_zero",
    "exchange",
    "gradual",
    "redistribute",
    "rotation",
]


class Round(NamedTuple):
    """What a plan sees: all sparse leaves of the network at one mask update."""

    leaves: list[Leaf]  # views as the scores see them
    drop_scores: list[jax.Array]  # of every entry of each leaf; only active ones count
    grow_scores: Callable[[], list[jax.Array]]  # the same of growth; for plans that compare them
    targets: list[Any]  # active weights of each leaf at the asked sparsity; of its parts, if cut
    starts: list[Any]  # active weights of each leaf at step 0
    fraction: jax.Array  # float32, shape (): the drop fraction of this round
    number: jax.Array  # int32, shape (): which round this is, from 1
    time: jax.Array  # float32, shape (): share of total_steps gone by
    is_last: jax.Array  # bool, shape (): whether no round follows
    regrow: bool  # whether what is dropped in this round may be grown in it
    state: Any  # what the plan keeps, () if nothing


class Plan(NamedTuple):
    """How a round's counts are chosen.

    Attributes:
      amounts: `round -> (k_drop, k_grow, state)`, integers for each leaf.
      starts: `(targets, sizes, spread) -> counts at step 0`, where `spread(sparsity)` shares
        another sparsity by the run's own distribution; None to start at the targets.
      init: makes `state`.
      trim: `(names, masks) -> masks` of all leaves, `MaskedNode` where dense: what goes beyond the
        counts, after a round that drops; None for nothing.
      exchanges: whether each leaf drops at most `fraction` of its active weights and grows as
        many. Then counts are static.
    """

    amounts: Callable[[Round], tuple[Counts, Counts, Any]]
    starts: Callable[[list[int], list[int], Callable[[float], list[int]]], list[int]] | None = None
    init: Callable[[], Any] = tuple
    trim: Callable[[list[str], list[Any]], list[Any]] | None = None
    exchanges: bool = False

    def first_counts(
        self,
        params: Any,
        targets: list[Any],
        spread: Callable[[float], list[Any]],
    ) -> list[Any]:
        """Counts of all leaves at step 0, None where dense, from those at the asked sparsity."""
        if self.starts is None:
            return targets
        sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(params)]
        sparse = [i for i, n in enumerate(targets) if n is not None]

        def only(counts: list[Any]) -> list[int]:
            return [counts[i] for i in sparse]

        chosen = self.starts(only(targets), only(sizes), lambda s: only(spread(s)))
        if sum(chosen) < sum(only(targets)):
            raise ValueError(
                f"the plan starts with {sum(chosen)} active weights, fewer than the "
                f"{sum(only(targets))} that sparsity= asks for in the end: lower the initial "
                "sparsity."
            )
        first: list[int | None] = [None] * len(targets)
        for i, n in zip(sparse, chosen, strict=True):
            first[i] = n
        return first


def exchange(*, of_all: bool = False, overall: bool = False) -> Plan:
    """Every leaf drops a share of its active weights and grows as many: SET, RigL, DST-EE.

    Args:
      of_all: the drop fraction is a share of all weights of the leaf, active or not (MEST's
        mutation ratio), at most all active ones.
      overall: drop the weights of lowest score over all leaves together and grow those of highest,
        so that counts move between leaves and the total stays (GSE). No leaf loses its last weight.
    """

    def of_network(round_: Round) -> tuple[Counts, Counts, Any]:
        sizes = round_.targets if not of_all else [leaf.mask.size for leaf in round_.leaves]
        wanted = portion(round_.fraction, sum(sizes))
        grows = counting.highest_overall(round_.leaves, round_.grow_scores(), wanted)
        total = counting.summed(grows)
        return (
            counting.lowest_overall(round_.leaves, round_.drop_scores, total),
            grows,
            round_.state,
        )

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        k: list[jax.Array | int] = []
        for leaf, target in zip(round_.leaves, round_.targets, strict=True):
            of = leaf.mask.size if of_all else target
            share = portion(round_.fraction, of)
            k.append(jnp.minimum(share, jnp.asarray(target, share.dtype)))
        return k, k, round_.state

    return Plan(of_network) if overall else Plan(amounts, exchanges=not of_all)


def below_zero() -> Plan:
    """Drop every active weight with a negative drop score, and grow as many in its leaf: DeepR."""

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        k = [
            counting.active(leaf.mask & (score < 0))
            for leaf, score in zip(round_.leaves, round_.drop_scores, strict=True)
        ]
        return k, k, round_.state

    return Plan(amounts)


def redistribute(importance: Score, *, cap: float = 0.99) -> Plan:
    """Drop a share of each leaf, grow where the active weights matter more: SNFS.

    A leaf's part of the regrowth is its mean importance over active weights, divided by the sum
    over leaves. A leaf gets at most `cap` of its free places (all of them, if the total needs
    it); the rest is shared again. The total count is exact.

    Args:
      importance: a score; its mean over a leaf's active weights is the leaf's weight.
      cap: share of a leaf's free places that may be filled, in (0, 1].
    """
    check_function("importance", importance, "one leaf", "scores.momentum()")
    check_number("cap", cap, "0.99")

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        drops, free, weights = [], [], []
        for leaf in round_.leaves:
            active = counting.active(leaf.mask)
            value = jnp.sum(jnp.where(leaf.mask, importance(leaf), 0), dtype=jnp.float32)
            weights.append(value / jnp.maximum(active, 1).astype(jnp.float32))
            # A leaf never loses its last weight.
            drops.append(jnp.minimum(portion(round_.fraction, active), jnp.maximum(active - 1, 0)))
            free.append(leaf.mask.size - active)
        return *counting.regrow(drops, free, weights, cap), round_.state

    return Plan(amounts)


def adaptive_threshold(initial: float = 1e-3, *, tolerance: float = 0.1) -> Plan:
    """Drop below one magnitude threshold for all leaves, grow where weights survived: DSR.

    The threshold doubles after a round that dropped fewer than `(1 - tolerance)` of the wanted
    number (the drop fraction of all active weights), and halves after one that dropped more
    than `(1 + tolerance)` of it. A leaf's part of the regrowth is its share of the surviving
    weights. The total count is exact; no leaf loses its last weight.

    Args:
      initial: the first threshold, in units of the drop score.
      tolerance: relative, in (0, 1).
    """
    check_number("initial", initial, "1e-3")
    check_number("tolerance", tolerance, "0.1")

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        threshold = round_.state
        drops, free, survivors = [], [], []
        for leaf, score in zip(round_.leaves, round_.drop_scores, strict=True):
            active = counting.active(leaf.mask)
            below = counting.active(leaf.mask & (score < threshold.astype(score.dtype)))
            drop = jnp.minimum(below, jnp.maximum(active - 1, 0))
            drops.append(drop)
            survivors.append((active - drop).astype(jnp.float32))
            free.append(leaf.mask.size - active)
        dropped = counting.summed(drops).astype(jnp.float32)
        wanted = round_.fraction * (counting.summed(survivors) + dropped)
        new = jnp.where(dropped < (1 - tolerance) * wanted, 2 * threshold, threshold)
        new = jnp.where(dropped > (1 + tolerance) * wanted, threshold / 2, new)
        return *counting.regrow(drops, free, survivors, 1.0), new

    return Plan(amounts, init=lambda: jnp.float32(initial))


def gradual(
    initial_sparsity: float,
    *,
    start: float = 0.0,
    end: float,
    power: float = 3.0,
    overall: bool = False,
) -> Plan:
    """From one sparsity to the target over time, while exchanging the drop fraction: GraNet, GMP.

    At share t of the training, n(t) = n_end + (n_start - n_end) (1 - (t - start) / (end - start))
    ^ power weights stay active, n_start before and n_end after. What is above n(t) is dropped
    for good; then each leaf exchanges the drop fraction of what it has left (0: none). The
    last round reaches n_end in any case.

    Args:
      initial_sparsity: at step 0, in [0, 1): 0 starts dense.
      start: share of training at which the number of weights begins to change.
      end: share of training at which the target is reached, at least `start`.
      power: 3 is the cubic schedule.
      overall: drop the weights of lowest score over all leaves together, so that counts move
        between leaves (no leaf loses its last weight). By default each leaf goes from its own
        first count to its own target.

    Raises:
      ValueError: `initial_sparsity` is not in [0, 1), or start and end are not in order in [0, 1].
    """
    check_number("initial_sparsity", initial_sparsity, "0.5")
    check_number("start", start, "0.0")
    check_number("end", end, "0.5")
    check_number("power", power, "3.0")
    if not 0 <= initial_sparsity < 1:
        raise ValueError(f"initial_sparsity={initial_sparsity} must be in [0, 1): 0 is dense.")
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start={start} and end={end} must be in order in [0, 1].")

    def wanted(round_: Round, first: int, last: int) -> jax.Array:
        left = 1 - jnp.clip((round_.time - start) / max(end - start, 1e-9), 0.0, 1.0)
        left = jnp.where(round_.is_last, 0.0, left)
        return last + jnp.round((first - last) * left**power).astype(jnp.int32)

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        active = [counting.active(leaf.mask) for leaf in round_.leaves]
        if overall:
            total = wanted(round_, sum(round_.starts), sum(round_.targets))
            prune = counting.lowest_overall(
                round_.leaves, round_.drop_scores, jnp.maximum(counting.summed(active) - total, 0)
            )
            missing: list[jax.Array | int] = [0] * len(active)
        else:
            goals = [wanted(round_, *p) for p in zip(round_.starts, round_.targets, strict=True)]
            prune = [jnp.maximum(n - g, 0) for n, g in zip(active, goals, strict=True)]
            missing = [jnp.maximum(g - n, 0) for n, g in zip(active, goals, strict=True)]
        swap = []
        for leaf, n, p, m in zip(round_.leaves, active, prune, missing, strict=True):
            free = leaf.mask.size - n - m + (n if round_.regrow else 0)
            swap.append(jnp.minimum(portion(round_.fraction, n - p), jnp.minimum(n - p, free)))
        drops = [p + s for p, s in zip(prune, swap, strict=True)]
        return drops, [s + m for s, m in zip(swap, missing, strict=True)], round_.state

    def starts(targets, sizes, spread):
        return list(sizes) if initial_sparsity == 0 else spread(initial_sparsity)

    return Plan(amounts, starts=starts)


def rotation(partitions: int) -> Plan:
    """One part of the leaves dense at a time, in rotation; the others at their target: GaP.

    The leaves, in the order of the parameters, are cut into parts of equal number. In round r
    part r mod `partitions` becomes dense and the one before it is pruned to its target; the
    first part is dense from the start, and the last round prunes all.

    Args:
      partitions: number of parts, at least 2.

    Raises:
      ValueError: it is less.
    """
    check_whole("partitions", partitions, least=None)
    if partitions < 2:
        raise ValueError(f"partitions={partitions} must be at least 2: one part is dense.")

    def part(i: int, leaves: int) -> int:
        return i * min(partitions, leaves) // leaves

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        n = len(round_.leaves)
        dense_part = round_.number % min(partitions, n)
        drops, grows = [], []
        for i, (leaf, target) in enumerate(zip(round_.leaves, round_.targets, strict=True)):
            active = counting.active(leaf.mask)
            dense = (part(i, n) == dense_part) & ~round_.is_last
            drops.append(jnp.where(dense, 0, jnp.maximum(active - target, 0)))
            grows.append(jnp.where(dense, leaf.mask.size - active, 0))
        return drops, grows, round_.state

    def starts(targets, sizes, spread):
        n = len(targets)
        pairs = zip(targets, sizes, strict=True)
        return [size if part(i, n) == 0 else count for i, (count, size) in enumerate(pairs)]

    return Plan(amounts, starts=starts)
