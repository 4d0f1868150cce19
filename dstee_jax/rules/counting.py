"""Counts of a round: how many weights are active, and how a total is shared among leaves."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dstee_jax.selection.bisection import largest_of_all
from dstee_jax.state import Leaf

Counts = Sequence[jax.Array | int]


def apportion(total: jax.Array | int, weights: Counts, caps: Counts) -> list[jax.Array]:
    """Share an integer total in proportion to weights, within integer caps.

    What a capped share can't take is shared again among the others; fractions of one go to
    the largest remainders. The sum is exactly min(total, sum of caps).

    Args:
      total: integer scalar, 0 or more; may be traced, like the rest.
      weights: non-negative numbers; if all are zero, or none is left below its cap, the caps'
        own room is the weight.
      caps: integers, 0 or more.

    Returns:
      An int32 scalar for each weight.

    Example:
      >>> [int(n) for n in apportion(10, [3.0, 1.0, 1.0], [4, 9, 9])]
      [4, 3, 3]
    """
    cap = jnp.stack([jnp.asarray(c, jnp.int32) for c in caps])
    weight = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights])
    weight = jnp.where(jnp.isfinite(weight), weight, 0)
    total = jnp.minimum(jnp.asarray(total, jnp.int32), _sum(cap))

    def share(_, given: jax.Array) -> jax.Array:
        room = cap - given
        open_weight = jnp.where(room > 0, weight, 0)
        open_weight = jnp.where(open_weight.sum() > 0, open_weight, room.astype(jnp.float32))
        rest = total - _sum(given)
        ideal = rest.astype(jnp.float32) * open_weight / jnp.maximum(open_weight.sum(), 1e-30)
        more = jnp.minimum(jnp.floor(ideal).astype(jnp.int32), room)
        before = jnp.cumsum(more, dtype=jnp.int32) - more
        more = jnp.minimum(more, jnp.maximum(rest - before, 0))
        # Fewer than one each is left: the largest remainders take it.
        left = rest - _sum(more)
        order = jnp.argsort(
            jnp.where(more < room, more.astype(jnp.float32) - ideal, jnp.inf), stable=True
        )
        rank = jnp.zeros_like(cap).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
        # As many as there are leaves, where each share of one was rounded to less.
        fractions = (left < order.size) | (_sum(more) == 0)
        extra = (rank < left) & (more < room) & fractions
        return given + more + extra.astype(jnp.int32)

    # Each pass fills a leaf or ends; the last float32 remainders need a few more.
    return list(jax.lax.fori_loop(0, len(caps) + 3, share, jnp.zeros_like(cap)))


def regrow(
    drops: list[jax.Array], free: list[jax.Array], weights: list[jax.Array], cap: float
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Drops, cut to what the network can grow again, and the growth of each leaf."""
    wanted, room = summed(drops), summed(free)
    cut = apportion(jnp.minimum(wanted, room), drops, drops)
    drops = [jnp.where(wanted <= room, d, c) for d, c in zip(drops, cut, strict=True)]
    wanted = jnp.minimum(wanted, room)
    capped = [jnp.floor(cap * f.astype(jnp.float32)).astype(jnp.int32) for f in free]
    first = apportion(wanted, weights, capped)
    left = [f - g for f, g in zip(free, first, strict=True)]
    over = apportion(wanted - summed(first), weights, left)
    return drops, [a + b for a, b in zip(first, over, strict=True)]


def lowest_overall(
    leaves: Sequence[Leaf], drop_scores: Sequence[jax.Array], count: jax.Array
) -> list[jax.Array]:
    """How many of the `count` active weights of lowest drop score lie in each leaf.

    The best of each leaf is left out while there are others.
    """
    scores = []
    for leaf, score in zip(leaves, drop_scores, strict=True):
        size = jnp.where(leaf.mask, -score.astype(jnp.float32), -jnp.inf)
        best = jnp.where(leaf.mask, score, -jnp.inf).max()
        scores.append(jnp.where(leaf.mask & (score == best), jnp.finfo(jnp.float32).min, size))
    return [active(chosen) for chosen in largest_of_all(scores, count)]


def highest_overall(
    leaves: Sequence[Leaf], grow_scores: Sequence[jax.Array], count: jax.Array
) -> list[jax.Array]:
    """How many of the `count` inactive weights of highest growth score lie in each leaf.

    Of those with a finite score alone: fewer than `count`, if there are fewer.
    """
    rows = zip(leaves, grow_scores, strict=True)
    able = [~leaf.mask & jnp.isfinite(score) for leaf, score in rows]
    pairs = zip(able, grow_scores, strict=True)
    scores = [jnp.where(can, score.astype(jnp.float32), -jnp.inf) for can, score in pairs]
    there = summed([active(can) for can in able])
    return [active(chosen) for chosen in largest_of_all(scores, jnp.minimum(count, there))]


def summed(counts: list[jax.Array]) -> jax.Array:
    """The sum of some counts."""
    return _sum(jnp.stack(counts))


def _sum(counts: jax.Array) -> jax.Array:
    """In the type of the counts, also where JAX adds integers in 64 bits."""
    return jnp.sum(counts, dtype=counts.dtype)


def active(mask: jax.Array) -> jax.Array:
    """How many entries of a mask are set; int32, shape ()."""
    return jnp.sum(mask, dtype=jnp.int32)
