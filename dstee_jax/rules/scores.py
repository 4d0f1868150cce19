"""Scores: what a weight is worth. Each is a function of one leaf, `score(leaf) -> array`.

A drop rule drops the active weights of lowest score, a growth rule grows the inactive ones of
highest score. The factories here return such functions; a function of your own is as good:

    def least_explored(leaf):
        return -leaf.counter.astype(float)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dstee_jax.arguments import check_function, check_number
from dstee_jax.selection.bisection import largest_of_all
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf, at_least_float32

Score = Callable[[Leaf], jax.Array]


def magnitude() -> Score:
    """Absolute weight: the drop rule of SET (RigL's version), RigL and DST-EE.

    References:
      Evci et al., "Rigging the Lottery", 2020, Section 3.
    """
    return lambda leaf: jnp.abs(leaf.param)


def gradient() -> Score:
    """Absolute gradient: the growth rule of RigL, the exploitation term of DST-EE.

    References:
      Evci et al., "Rigging the Lottery", 2020, Section 3.
    """
    return lambda leaf: jnp.abs(leaf.grad)


def momentum() -> Score:
    """Absolute dense momentum, from `memory.dense_momentum`: the growth rule of SNFS.

    References:
      Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019, Section 3.
    """
    return lambda leaf: jnp.abs(leaf.rule_state)


def magnitude_and_gradient(weight: float = 1.0) -> Score:
    """|w| + weight * |g|: the drop rule of MEST.

    Args:
      weight: of the gradient, 0 or more.

    Raises:
      ValueError: it is negative, or no number.

    References:
      Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
      Edge", 2021, Section 3.
    """
    check_number("weight", weight, "1.0")
    if not weight >= 0:
        raise ValueError(f"weight={weight} must be 0 or more: 0 is magnitude alone.")
    return lambda leaf: jnp.abs(leaf.param) + weight * jnp.abs(leaf.grad)


def two_sided(fraction: float = 0.3) -> Score:
    """The smallest positive and the largest negative weights: the drop rule of SET as published.

    Of a leaf's active weights, floor(fraction n) of the n negative ones are dropped, those nearest
    to zero, and of the others those nearest to zero for the rest of what is dropped.

    Args:
      fraction: zeta, in [0, 1]; the same as `drop_fraction=optax.constant_schedule(zeta)`.

    Raises:
      ValueError: it is out of range.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> w, mask = jnp.array([3.0, 1.0, -5.0, -4.0, 2.0, 6.0]), jnp.ones(6, bool)
      >>> leaf = dstee.Leaf(w, None, mask, mask, jax.random.key(0), 1)
      >>> jax.lax.top_k(-two_sided(0.5)(leaf), 3)[1].tolist()  # -4, 1 and 2
      [3, 1, 4]

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018, Algorithm 1.
    """
    check_number("fraction", fraction, "0.3")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} must be in [0, 1], as 0.3.")

    def score(leaf: Leaf) -> jax.Array:
        w = leaf.param.astype(at_least_float32(leaf.param.dtype))
        negative = leaf.mask & (w < 0)
        n = jnp.sum(negative, dtype=jnp.int32).astype(jnp.float32)
        k = jnp.floor(fraction * n).astype(jnp.int32)
        (first,) = largest_of_all([jnp.where(negative, w, -jnp.inf)], k)
        others = jnp.where(negative, jnp.finfo(w.dtype).max, jnp.abs(w))
        return jnp.where(first, -jnp.ones_like(w), others)

    return score


def saliency() -> Score:
    """|w g|, what the loss would change by without the weight, to first order.

    A drop rule: of active weights, since inactive ones score 0.

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      2017, Section 2.2.
    """
    return lambda leaf: jnp.abs(leaf.param * leaf.grad)


def normalized(score: Score) -> Score:
    """A score over its Euclidean norm in the leaf's active weights: comparable between leaves.

    For plans that compare all leaves, as `plans.gradual(..., overall=True)`.

    Args:
      score: as `saliency()`.

    References:
      Lee et al., "JaxPruner: A Concise Library for Sparsity Research", 2023, whose global
      pruners do so; 1e-8 is added to the norm, as there.
    """
    check_function("score", score, "one leaf", "scores.saliency()")

    def over_norm(leaf: Leaf) -> jax.Array:
        value = score(leaf)
        value = value.astype(at_least_float32(value.dtype))
        norm = jnp.sqrt(jnp.sum(jnp.square(value), where=leaf.mask))
        return value / (norm + 1e-8)

    return over_norm


def along_sign() -> Score:
    """The weight times its fixed sign, from `memory.signs`: DeepR's theta, which drops below 0.

    References:
      Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018, Algorithm 1.
    """
    return lambda leaf: jnp.where(leaf.rule_state, leaf.param, -leaf.param)


def random() -> Score:
    """Uniform in [0, 1): the growth rule of SET. float32, from the leaf's own key.

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018.
    """

    def score(leaf: Leaf) -> jax.Array:
        place = sharding_of(leaf.param)
        return jax.random.uniform(leaf.key, leaf.param.shape, jnp.float32, out_sharding=place)

    return score


def acquisition(
    c: float = 1e-3, eps: float = 1.0, *, normalize: bool = False, signed: bool = False
) -> Score:
    """The acquisition function of DST-EE: exploitation plus exploration.

    S = |g| + c ln(t) / (N + eps), with g the gradient of the loss, t the step and N the number
    of rounds in which the weight was active.

    Args:
      c: the weight of exploration, in units of a gradient; 0 or more. Near the size of a
        typical inactive gradient both terms count; far above it growth is by age alone. The
        default is measured: see `experiments/studies/sweep.py` and docs/defaults.md.
      eps: above 0. With a small eps, c ln(t) / eps of a never-active weight swallows the
        gradient in float32; the unexplored weights tie, the tie goes to the lowest index, and
        a contiguous band of weights grows.
      normalize: divide the gradient by the mean absolute gradient of its leaf first, so that
        one c (now without a unit) serves all layers. Non-finite entries are left out of the
        mean.
      signed: take g with its sign, as Algorithm 1 has it, not its absolute value (Eq. 1).

    Returns:
      A score: leaf -> float array of the leaf's shape, float32 or wider.

    Raises:
      ValueError: c is negative or eps is not positive.

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Eq. 1.

    Deviations:
      Algorithm 1 writes the signed gradient where Eq. 1 writes the absolute one; the default
      follows Eq. 1.
    """
    check_number("c", c, "1e-3")
    check_number("eps", eps, "1.0")
    if not c >= 0:
        raise ValueError(f"c={c} must be 0 or more: 0 is growth by gradient alone.")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0: it stands in a denominator. Try 1.0.")

    def score(leaf: Leaf) -> jax.Array:
        g = leaf.grad.astype(at_least_float32(leaf.grad.dtype))
        size = jnp.abs(g)
        g = g if signed else size
        if normalize:
            finite = jnp.isfinite(size)
            mean = jnp.mean(size, where=finite)
            g = g / jnp.where(mean > 0, mean, jnp.ones_like(mean))
        ln_t = jnp.log(leaf.count.astype(g.dtype))
        return g + c * ln_t / (leaf.counter.astype(g.dtype) + eps)

    return score
