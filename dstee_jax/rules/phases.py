"""Plans whose rounds differ in kind: some drop, others grow."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dstee_jax.rules import counting
from dstee_jax.rules.counting import Counts
from dstee_jax.rules.plans import Plan, Round
from dstee_jax.rules.schedule import portion
from dstee_jax.selection.parts import laid_as, whole
from dstee_jax.trees import is_dense

__all__ = ["alternate", "drop_then_grow", "linked"]


def drop_then_grow(*, chain: Sequence[str] = ()) -> Plan:
    """One round drops a share of each leaf, the next grows it again: CHT.

    So the growth score sees the mask after the drop, and what was dropped may come back. With
    both rounds on neighbouring steps, and no weight updated on either (`update_weights=False`),
    the network in between is never trained. The last round only grows; a leaf that is dense at
    the asked sparsity stays so.

    Args:
      chain: names of kernels (inputs, outputs), each of which reads what the one before it gives:
        after a drop the weights of hidden units that have no inputs, or no outputs, go too.

    Raises:
      ValueError: the chain is no sequence of names; in a round, the kernels do not fit.
    """

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        active = [counting.active(leaf.mask) for leaf in round_.leaves]
        pairs = zip(round_.targets, active, strict=True)
        missing = [jnp.maximum(target - n, 0) for target, n in pairs]
        due = ~round_.is_last & (jnp.max(jnp.stack(missing)) == 0)
        drops = []
        for leaf, target, n in zip(round_.leaves, round_.targets, active, strict=True):
            k = jnp.minimum(portion(round_.fraction, n), jnp.maximum(n - 1, 0))
            drops.append(jnp.where(due & (target < leaf.mask.size), k, 0))
        return drops, missing, round_.state

    if isinstance(chain, str) or not isinstance(chain, Sequence):
        raise ValueError(f"chain={chain!r} must be names of leaves, as ('a/kernel', 'b/kernel').")
    return Plan(amounts, trim=functools.partial(linked, tuple(chain)) if chain else None)


def linked(chain: Sequence[str], names: list[str], masks: list[Any]) -> list[Any]:
    """Masks without the weights of hidden units of a chain that nothing leads to, or from.

    Args:
      chain: names of kernels (inputs, outputs) that follow each other.
      names: of all leaves.
      masks: of all leaves, bool; `MaskedNode` for a dense one, which links all of its units.

    Raises:
      ValueError: a name is unknown, or two kernels do not fit.
    """
    missing = [name for name in chain if name not in names]
    if missing or len(chain) < 2:
        raise ValueError(f"chain={chain} must be two or more of the leaves {names}, in order.")
    places, new = [names.index(name) for name in chain], list(masks)
    for i in places:
        new[i] = new[i] if is_dense(new[i]) else whole(new[i])
    pairs = [
        (i, j) for i, j in itertools.pairwise(places) if not (is_dense(new[i]) or is_dense(new[j]))
    ]
    for i, j in pairs:
        if not new[i].ndim == new[j].ndim == 2 or new[i].shape[1] != new[j].shape[0]:
            raise ValueError(
                f"chain={chain}: {names[i]} of shape {new[i].shape} and {names[j]} of shape "
                f"{new[j].shape} do not follow each other as (inputs, outputs)."
            )
    for i, j in pairs:  # what nothing leads to, from the inputs on
        new[j] = new[j] & new[i].any(0)[:, None]
    for i, j in reversed(pairs):
        new[i] = new[i] & new[j].any(1)[None, :]
    return [m if is_dense(m) else laid_as(m, old) for m, old in zip(new, masks, strict=True)]


def alternate(*, overall: bool = True) -> Plan:
    """All weights active, then as many as asked for, then all again: AC/DC.

    Starts dense. The first round drops the weights of lowest score, the second activates all, and
    so on in turn; the last one drops in any case.

    Args:
      overall: drop those of lowest score over all leaves together, so that counts differ from one
        sparse phase to the next (no leaf loses its last weight). Otherwise each leaf goes to its
        own target.
    """

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        active = [counting.active(leaf.mask) for leaf in round_.leaves]
        sparse = (round_.number % 2 == 1) | round_.is_last
        if overall:
            above = jnp.maximum(counting.summed(active) - sum(round_.targets), 0)
            over = counting.lowest_overall(round_.leaves, round_.drop_scores, above)
        else:
            pairs = zip(active, round_.targets, strict=True)
            over = [jnp.maximum(n - target, 0) for n, target in pairs]
        drops = [jnp.where(sparse, n, 0) for n in over]
        free = [leaf.mask.size - n for leaf, n in zip(round_.leaves, active, strict=True)]
        return drops, [jnp.where(sparse, 0, n) for n in free], round_.state

    return Plan(amounts, starts=lambda targets, sizes, spread: list(sizes))
