"""Plans whose rounds differ in kind: some drop, others grow."""

from typing import Any

import jax.numpy as jnp

from dstee_jax.rules.plans import Counts, Plan, Round
from dstee_jax.rules.schedule import portion


def drop_then_grow() -> Plan:
    """One round drops a share of each leaf, the next grows it again: CHT.

    So the growth score sees the mask after the drop, and what was dropped may come back. With
    both rounds on neighbouring steps, and no weight updated on either (`update_weights=False`),
    the network in between is never trained. The last round only grows; a leaf that is dense at
    the asked sparsity stays so.
    """

    def amounts(round_: Round) -> tuple[Counts, Counts, Any]:
        active = [jnp.sum(leaf.mask, dtype=jnp.int32) for leaf in round_.leaves]
        pairs = zip(round_.targets, active, strict=True)
        missing = [jnp.maximum(target - n, 0) for target, n in pairs]
        due = ~round_.is_last & (jnp.max(jnp.stack(missing)) == 0)
        drops = []
        for leaf, target, n in zip(round_.leaves, round_.targets, active, strict=True):
            k = jnp.minimum(portion(round_.fraction, n), jnp.maximum(n - 1, 0))
            drops.append(jnp.where(due & (target < leaf.mask.size), k, 0))
        return drops, missing, round_.state

    return Plan(amounts)
