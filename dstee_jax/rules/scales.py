"""Scales: by how much the update of an active weight is multiplied, after the optimizer.

Each is a function of one leaf, as a score is: `transform(scale=scales.warm_up(100), ...)`. A leaf
then has `grown`: the step at which a weight was grown, 0 if it has been active from the start.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.arguments import check_function, check_number
from dstee_jax.rules.scores import Score
from dstee_jax.state import Leaf


def warm_up(steps: int = 100) -> Score:
    """min(t / steps, 1) for a weight that grew t steps ago; 1 for the first mask's weights.

    Args:
      steps: 1 or more; 1 is none. SMET's is 100, the steps between rounds.

    Raises:
      ValueError: it is less.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.transform(optax.sgd(0.1), scale=dstee.scales.warm_up(100), sparsity=0.9,
      ...                      total_steps=1000, key=jax.random.key(0))

    References:
      SMET, 2026, and its code (github.com/QiaoXiao7282/SMET).

    Deviations:
      The update is scaled, as a summary of the paper has it. The authors' code multiplies the
      first moment itself, anew on each step.
    """
    check_number("steps", steps, "100")
    if not steps >= 1:
        raise ValueError(f"steps={steps} must be 1 or more: 1 warms nothing up.")
    return lambda leaf: jnp.where(_later(leaf), jnp.minimum(_age(leaf) / steps, 1), 1)


def own_bias_correction(b1: float = 0.9, b2: float = 0.999) -> Score:
    """Adam's bias correction by the steps of each weight, not of the whole training.

    A weight that grew t steps ago, at step T, has moments of t gradients, which Adam divides by
    1 - b^T. Its first update is then (1 - b1) / sqrt(1 - b2) = 3.2 times that of a first step.
    The factor (1 - b1^T) / (1 - b1^t) sqrt((1 - b2^t) / (1 - b2^T)) makes it as if Adam counted
    from its growth.

    Args:
      b1, b2: the inner optimizer's, which must be Adam's kind: `optax.adam`, `adamw`, ...

    Raises:
      ValueError: one is not in [0, 1).

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.transform(optax.adam(1e-3), scale=dstee.scales.own_bias_correction(),
      ...                      sparsity=0.9, total_steps=1000, key=jax.random.key(0))

    References:
      SMET, 2026, and its code (github.com/QiaoXiao7282/SMET). Kingma and Ba, "Adam: A Method for
      Stochastic Optimization", 2015, Section 3.

    Deviations:
      Exact but for Adam's epsilon, which is scaled too, as is the weight decay of `adamw`. The
      first update counts 1, in the authors' code 2.
    """
    check_number("b1", b1, "0.9")
    check_number("b2", b2, "0.999")
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"b1={b1} and b2={b2} must be in [0, 1), as 0.9 and 0.999.")

    def left(b: float, steps: jax.Array) -> jax.Array:
        return 1 - jnp.power(jnp.asarray(b, jnp.float32), steps)

    def scale(leaf: Leaf) -> jax.Array:
        age, count = _age(leaf), leaf.count.astype(jnp.float32)
        first = left(b1, count) / left(b1, age)
        second = jnp.sqrt(left(b2, age) / left(b2, count))
        return jnp.where(_later(leaf), first * second, 1)

    return scale


def density(power: float = 0.5) -> Score:
    """density^-power of the leaf (or its layer) at the asked sparsity: sparser ones learn faster.

    Args:
      power: 0.5 in SMET's paper; its scripts use about 1.

    Raises:
      ValueError: it is no number, or the result is not finite in float32.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.transform(optax.adam(1e-3), scale=dstee.scales.density(), sparsity=0.9,
      ...                      total_steps=1000, key=jax.random.key(0))

    References:
      SMET, 2026, by a summary of the paper; off by default in its code.
    """
    check_number("power", power, "0.5")

    def scale(leaf: Leaf) -> jax.Array:
        share = jnp.mean(leaf.mask, dtype=jnp.float32)
        if leaf.target is not None:
            share = jnp.float32(leaf.target / leaf.mask.size)
            with np.errstate(over="ignore", divide="ignore"):
                factor = np.float32(leaf.target / leaf.mask.size) ** np.float32(-power)
            if not np.isfinite(factor):
                raise ValueError(
                    f"power={power} multiplies updates of a leaf of density "
                    f"{leaf.target / leaf.mask.size:.3g} by {factor}: lower it, as 0.5."
                )
        return jnp.full(leaf.mask.shape, share**-power)

    return scale


def product(*scales: Score) -> Score:
    """The product of some scales.

    Args:
      *scales: one or more, as `warm_up()`.

    Raises:
      ValueError: there is none, or one is no function of a leaf.
    """
    if not scales:
        raise ValueError("a product of no scales: pass one or more, as scales.warm_up().")
    for one in scales:
        check_function("scale", one, "one leaf", "scales.warm_up()")
    return lambda leaf: functools.reduce(operator.mul, [scale(leaf) for scale in scales])


def _later(leaf: Leaf) -> jax.Array:
    """Which weights have been grown in a round."""
    return leaf.grown > 0


def _age(leaf: Leaf) -> jax.Array:
    """Steps since a weight was grown, 1 on its first update; float32, 1 or more."""
    return jnp.maximum(leaf.count - leaf.grown, 1).astype(jnp.float32)
