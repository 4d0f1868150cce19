"""Penalties: what a method adds to the gradient of active weights before the optimizer sees it.

Each is a function of one leaf, as a score is.
"""

import jax
import jax.numpy as jnp

from dstee_jax.arguments import check_number
from dstee_jax.rules.scores import Score
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf


def l1_with_noise(l1: float = 1e-5, noise: float = 1e-5) -> Score:
    """DeepR's prior and random walk: l1 * sign + noise * N(0, 1), sign from `memory.signs`.

    Under plain SGD both are then scaled by the learning rate.

    Args:
      l1: weight of the prior.
      noise: standard deviation of the random walk.

    Raises:
      ValueError: one is no number.

    References:
      Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018, Eq. 3.
    """
    check_number("l1", l1, "1e-5")
    check_number("noise", noise, "1e-5")

    def penalty(leaf: Leaf) -> jax.Array:
        sign = jnp.where(leaf.rule_state, 1.0, -1.0)
        return l1 * sign + noise * jax.random.normal(
            leaf.key, leaf.param.shape, out_sharding=sharding_of(leaf.param)
        )

    return penalty


def admm(rho: float, start: int, stop: int, *, reweighted: bool = True) -> Score:
    """The gradient of ADMM's penalty on steps in (start, stop], with `memory.admm`.

    rho * a * (w - z + u), a = 1 / (|w| + m / 10) over its mean, with m the mean |w| of the leaf;
    a = 1 if not `reweighted`.

    Args:
      rho: weight of the penalty.
      start, stop: steps.
      reweighted: smaller weights are pulled harder.

    Raises:
      ValueError: rho is no number.

    References:
      Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction
      Method of Multipliers", 2018, Section 3.
    """
    check_number("rho", rho, "1e-2")

    def penalty(leaf: Leaf) -> jax.Array:
        size = jnp.abs(leaf.param)
        a = 1 / (size + 0.1 * size.mean() + 1e-12)
        a = a / a.mean() if reweighted else jnp.ones_like(size)
        z, u = leaf.rule_state
        on = (leaf.count > start) & (leaf.count <= stop)
        return jnp.where(on, rho * a * (leaf.param - z + u), 0.0)

    return penalty
