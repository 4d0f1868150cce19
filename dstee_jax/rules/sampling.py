"""Scores that draw: in proportion to another score, or a subset of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dstee_jax.arguments import check_function, check_number
from dstee_jax.rules.scores import Score
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf, at_least_float32


def sampled(score: Score, power: float | Callable[[jax.Array], jax.Array] = 1.0) -> Score:
    """Sample by a score instead of taking its best: probability in proportion to score^power.

    The key power ln(score) + a Gumbel number: the k entries of largest keys are k draws without
    replacement, each in proportion to score^power among those that are left, exactly. As `drop`
    the kept weights are drawn so, as `grow` the grown ones. Scores of 0 and below are drawn when
    no other is left, at random among themselves.

    Args:
      score: as `magnitude()`.
      power: 1 or more is nearer to the best, 0 is at random; a number, or a function of the step.

    Returns:
      A score: leaf -> float array of the leaf's shape, float32 or wider.

    Raises:
      ValueError: the score is no function of a leaf, or the power negative or no number.

    References:
      Kool et al., "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
      Sequences Without Replacement", 2019, Section 2.3.
    """
    check_function("score", score, "one leaf", "scores.magnitude()")
    if not callable(power):
        check_number("power", power, "1.0")
        if not power >= 0:
            raise ValueError(f"power={power} must be 0 or more: 0 draws at random.")

    def keys(leaf: Leaf) -> jax.Array:
        value = score(leaf)
        value = value.astype(at_least_float32(value.dtype))
        place, key = sharding_of(leaf.param), jax.random.fold_in(leaf.key, 1)
        tiny = jnp.finfo(value.dtype).tiny
        u = jax.random.uniform(key, value.shape, value.dtype, minval=tiny, out_sharding=place)
        exponent = power(leaf.count) if callable(power) else power
        exponent = jnp.asarray(exponent, value.dtype)
        some = jnp.where(value > 0, value, jnp.ones_like(value))
        gumbel = -jnp.log(-jnp.log(u))
        last = jnp.finfo(value.dtype).min / (2 + u)
        return jnp.where(value > 0, exponent * jnp.log(some) + gumbel, last)

    return keys


def subset(score: Score, share: float = 1.0) -> Score:
    """A score of a random subset of a leaf; what is not in it can't grow: GSE's uniform subset.

    An entry is in the subset as if `share` times as many pairs of an input and an output had been
    drawn, uniformly and with replacement, as the leaf has active weights: with the chance
    1 - (1 - 1 / size)^(share n). Where half of the leaf is active or more, all entries are.

    Args:
      score: as `gradient()`.
      share: above 0; 1 has about as many candidates as there are active weights.

    Returns:
      A score: leaf -> float array of the leaf's shape, float32 or wider; minus infinity outside.

    Raises:
      ValueError: share is not above 0.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> mask = jnp.arange(10_000).reshape(100, 100) < 1000
      >>> leaf = dstee.Leaf(1.0 * mask, 1.0 * mask, mask, mask, jax.random.key(0), 1)
      >>> found = subset(dstee.scores.gradient())(leaf)
      >>> 900 < int(jnp.isfinite(found).sum()) < 1000  # some pairs are drawn twice
      True

    References:
      Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic
      Exploration", 2024, Section 3, and its code (github.com/mikeheddes/
      guided-stochastic-exploration).

    Deviations:
      Entries are drawn independently, with the chances that pairs have. The gradient is the dense
      one that JAX makes: the rule is GSE's, its saving is not (with tiles it is:
      `dstee.tiles(..., candidates=)`). Inputs and outputs are drawn uniformly; GraBo and GraEst,
      which draw them by activations and their gradients, are left out: a score sees neither.
    """
    check_function("score", score, "one leaf", "scores.gradient()")
    check_number("share", share, "1.0")
    if not share > 0:
        raise ValueError(f"share={share} must be above 0: 1 draws as many as are active.")

    def of_subset(leaf: Leaf) -> jax.Array:
        value = score(leaf)
        value = value.astype(at_least_float32(value.dtype))
        place, key = sharding_of(leaf.param), jax.random.fold_in(leaf.key, 1)
        active = jnp.sum(leaf.mask, dtype=jnp.int32).astype(jnp.float32)
        chance = -jnp.expm1(share * active * jnp.log1p(jnp.float32(-1 / leaf.mask.size)))
        u = jax.random.uniform(key, value.shape, jnp.float32, out_sharding=place)
        chance = jnp.where(2 * active >= leaf.mask.size, 1.0, chance)
        return jnp.where(u < chance, value, -jnp.inf)

    return of_subset
