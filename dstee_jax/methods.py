"""Methods by name: factories in the way of optax's aliases, made from the parts of `transform`.

Each takes `inner` and the keyword arguments of `dstee.transform`, which override its own
defaults, and returns the same kind of transformation.
"""

from typing import Any, TypeAlias

import optax

from dstee_jax import memory, penalties, plans, scores
from dstee_jax.transform import transform

Inner: TypeAlias = optax.GradientTransformation | None
Transform: TypeAlias = optax.GradientTransformationExtraArgs
Options: TypeAlias = dict[str, Any]


def dst_ee(
    inner: Inner = None,
    *,
    c: float = 1e-3,
    eps: float = 1.0,
    normalize: bool = False,
    **options: Any,
) -> Transform:
    """DST-EE: grow by gradient plus exploration bonus; c, eps, normalize of the acquisition.

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Algorithm 1, Eq. 1.
    """
    return transform(inner, grow=scores.acquisition(c, eps, normalize=normalize), **options)


def rigl(inner: Inner = None, **options: Any) -> Transform:
    """RigL: drop by magnitude, grow by absolute gradient; alpha 0.3, ΔT 100, stop at 0.75.

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, Algorithm 1.

    Deviations:
      Ties in the drop score go to the lowest index; the authors' code breaks them by noise of
      1e-5.
    """
    defaults: Options = {"grow": scores.gradient(), "regrow": True}
    return transform(inner, **defaults | options)


def set(inner: Inner = None, **options: Any) -> Transform:
    """SET: drop by magnitude, grow at random; just-dropped weights may come back.

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018; as in Evci et al., 2020.

    Deviations:
      The original drops the smallest positive and the largest negative weights separately,
      once an epoch (pass `every=steps_per_epoch`), at a constant 0.3 (pass
      `drop_fraction=optax.constant_schedule(0.3)`, `stop=1.0`), and keeps the output dense.
      This is the version that RigL compares with: magnitude, RigL's schedule.
    """
    defaults: Options = {"grow": scores.random(), "regrow": True}
    return transform(inner, **defaults | options)


def static(inner: Inner = None, **options: Any) -> Transform:
    """Static: the first mask, kept: random, or `masks=` from `dstee.at_init`. No rounds."""
    defaults: Options = {"every": None}
    return transform(inner, **defaults | options)


def rigl_itop(inner: Inner = None, *, total_steps: int, **options: Any) -> Transform:
    """RigL in ITOP's setting: optimizer step first, rate 0.5 by cosine to 0.005, no early stop.

    `every` is 4000 (CIFAR and ImageNet).

    References:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, Section 4.

    Deviations:
      k is rounded down, theirs up; first masks have exact counts, theirs are Bernoulli draws.
    """
    defaults = _itop(total_steps) | {"grow": scores.gradient(), "every": 4000}
    return transform(inner, **defaults | options)


def set_itop(inner: Inner = None, *, total_steps: int, **options: Any) -> Transform:
    """SET in ITOP's setting: as `rigl_itop`, with random growth and `every` 1500.

    References:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, Section 4.

    Deviations:
      As `rigl_itop`.
    """
    defaults = _itop(total_steps) | {"grow": scores.random(), "every": 1500}
    return transform(inner, **defaults | options)


def deep_r(
    inner: Inner = None, *, l1: float = 1e-5, noise: float = 1e-5, **options: Any
) -> Transform:
    """DeepR: on every step, drop the weights that crossed zero and grow as many at random.

    Each connection keeps the sign of its initial value. The gradient of an active weight gets
    `l1 * sign + noise * N(0, 1)` before it reaches `inner`, which in the paper is plain SGD.

    Args:
      inner: the optimizer; required, since the l1 term and the noise pass through it.
      l1: coefficient of the l1 term.
      noise: standard deviation of the noise, in units of the gradient.
      **options: of `dstee.transform`.

    References:
      Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018, Algorithm 1.

    Deviations:
      A new connection starts at 0 and is dropped below 0, where theirs starts at 1e-12 and is
      dropped at 0 or below; one dropped in a step can't come back in the same step. Theirs
      keeps one total for the network, ours one for each leaf. Whether 1e-5 is the variance or
      the standard deviation of the noise could not be checked: here the latter.
    """
    defaults: Options = {
        "plan": plans.below_zero(),
        "memory": memory.signs(),
        "penalty": penalties.l1_with_noise(l1, noise),
        "drop": scores.along_sign(),
        "grow": scores.random(),
        "every": 1,
        "stop": 1.0,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def snfs(inner: Inner = None, *, total_steps: int, decay: float = 0.9, **options: Any) -> Transform:
    """SNFS (sparse momentum): grow by dense momentum, in the layers where it is largest.

    Drops by magnitude in each leaf, at a rate from 0.5 by cosine to 0.005. A leaf's share of
    the regrowth is the mean |momentum| of its active weights. `every` is 390, an epoch of
    CIFAR at batch 128: pass your own number of steps in an epoch.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      decay: of the dense momentum, which `transform` keeps itself.
      **options: of `dstee.transform`.

    References:
      Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without Losing
      Performance", 2019, Algorithm 1.

    Deviations:
      The momentum is the heavy-ball one of the dense gradient, whatever `inner` is (theirs
      reads the optimizer's, and for Adam m / (sqrt(v) + 1e-8)).
    """
    defaults: Options = {
        "total_steps": total_steps,
        "plan": plans.redistribute(scores.momentum()),
        "memory": memory.dense_momentum(decay),
        "grow": scores.momentum(),
        "drop_fraction": _half_to_nearly_none(total_steps),
        "every": 390,
        "stop": 1.0,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def dsr(
    inner: Inner = None, *, total_steps: int, threshold: float = 1e-3, **options: Any
) -> Transform:
    """DSR: drop below one adaptive threshold for all layers, grow at random where weights survive.

    The threshold doubles or halves to keep the dropped number near the drop fraction, 0.1 of
    the active weights. Rounds come every 100 steps at first, and half as often after each
    quarter of the training; they stop at 0.95.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      threshold: the first one.
      **options: of `dstee.transform`; pass `every` for another length of training.

    References:
      Mostafa and Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by
      Dynamic Sparse Reparameterization", 2019, Algorithm 1.

    Deviations:
      The authors give the wanted number of drops by network; the fraction 0.1 and the steps at
      which the period doubles are ours.
    """
    defaults: Options = {
        "total_steps": total_steps,
        "plan": plans.adaptive_threshold(threshold),
        "grow": scores.random(),
        "drop_fraction": optax.constant_schedule(0.1),
        "every": lambda step: 100 * 2 ** min(4 * step // max(total_steps, 1), 3),
        "stop": 0.95,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def mest(
    inner: Inner = None,
    *,
    total_steps: int,
    gradient_weight: float = 1.0,
    **options: Any,
) -> Transform:
    """MEST (EM): drop by |w| + lambda |g|, grow at random.

    The drop fraction steps down: 0.3, then 0.15 and 0.075 after each third of the training.
    `every` is 1950, five epochs of CIFAR at batch 128.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      gradient_weight: lambda.
      **options: of `dstee.transform`.

    References:
      Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
      Edge", 2021, Section 3.

    Deviations:
      Their mutation ratio is a share of all weights of a layer, ours of the active ones
      (`plan=plans.exchange(of_all=True)` with a small `drop_fraction` is theirs). EM drops and
      grows in one exchange, where theirs prunes below the target and grows back: the same
      masks. lambda and the steps of the ratio could not be checked.
    """
    thirds = {max(total_steps // 3, 1): 0.5, max(2 * total_steps // 3, 2): 0.5}
    defaults: Options = {
        "total_steps": total_steps,
        "drop": scores.magnitude_and_gradient(gradient_weight),
        "grow": scores.random(),
        "drop_fraction": optax.piecewise_constant_schedule(0.3, thirds),
        "every": 1950,
        "stop": 0.9,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def mest_ems(
    inner: Inner = None,
    *,
    total_steps: int,
    sparsity: float,
    elastic: float = 1.5,
    stop: float = 0.9,
    **options: Any,
) -> Transform:
    """MEST with its elastic memory (EM&S): as `mest`, from denser masks down to the target.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      sparsity: the final one, a number.
      elastic: how many times the final number of weights is active at first; it falls linearly
        to the target at the last round.
      stop: share of training at which the target is reached and the rounds end.
      **options: of `mest`.

    References:
      As `mest`.

    Deviations:
      As `mest`. The elastic start of 1.5 times the weights could not be checked.
    """
    if not isinstance(sparsity, float | int):
        raise ValueError(f"mest_ems needs one sparsity for the network, not {sparsity!r}.")
    if not elastic >= 1:
        raise ValueError(f"elastic={elastic} must be 1 or more: EM&S starts denser than it ends.")
    first = max(1 - elastic * (1 - sparsity), 0.0)
    defaults: Options = {"plan": plans.gradual(first, end=stop, power=1.0)}
    common: Options = {"total_steps": total_steps, "sparsity": sparsity, "stop": stop}
    return mest(inner, **defaults | common | options)


def granet(
    inner: Inner = None,
    *,
    total_steps: int,
    initial_sparsity: float = 0.5,
    end: float = 0.5,
    **options: Any,
) -> Transform:
    """GraNet: prune gradually over the whole network, and regenerate in each layer by gradient.

    A round first prunes the smallest weights of the network to a cubic schedule, from
    `initial_sparsity` to the target at share `end` of the training; then each leaf drops by
    magnitude and grows by gradient, at a rate from 0.5 by cosine to 0.005, to the end.
    `every` is 1000 (CIFAR; 4000 on ImageNet).

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      initial_sparsity: at step 0; 0 starts dense.
      end: share of training at which the target is reached.
      **options: of `dstee.transform`.

    References:
      Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
      2021, Algorithm 1.

    Deviations:
      The first mask has exact counts; theirs is a Bernoulli draw.
    """
    defaults = _itop(total_steps) | {
        "plan": plans.gradual(initial_sparsity, end=end, overall=True),
        "grow": scores.gradient(),
        "every": 1000,
    }
    return transform(inner, **defaults | options)


def gap(inner: Inner = None, *, total_steps: int, partitions: int = 4, **options: Any) -> Transform:
    """GaP: one part of the layers dense at a time, in rotation; the others pruned by magnitude.

    Two rotations by default, the last round, which prunes all, at 0.8 of the training.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      partitions: number of parts; 4 for ResNet-50.
      **options: of `dstee.transform`; `every` is the time that a part stays dense.

    References:
      Ma et al., "Effective Model Sparsification by Scheduled Grow-and-Prune Methods", 2022,
      Algorithm 1 (the cyclic version).

    Deviations:
      Parts are runs of leaves in the order of the parameters, with equal numbers of leaves. The
      number of rotations is ours.
    """
    defaults: Options = {
        "total_steps": total_steps,
        "plan": plans.rotation(partitions),
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "every": max(int(0.8 * total_steps) // (2 * partitions), 1),
        "stop": 0.8,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def gmp(
    inner: Inner = None,
    *,
    initial_sparsity: float = 0.0,
    start: float = 0.0,
    stop: float = 0.75,
    overall: bool = False,
    **options: Any,
) -> Transform:
    """GMP: gradual magnitude pruning, by a cubic schedule from dense to the target.

    Args:
      inner: the optimizer.
      initial_sparsity: at step 0; 0 starts dense.
      start: share of training at which pruning starts.
      stop: share of training at which the target is reached.
      overall: one threshold for the network; by default each leaf goes to its own target.
      **options: of `dstee.transform`.

    References:
      Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
      compression", 2017, Eq. 1.
    """
    defaults: Options = {
        "plan": plans.gradual(initial_sparsity, start=start, end=stop, overall=overall),
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "start": start,
        "stop": stop,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def admm(
    inner: Inner = None,
    *,
    total_steps: int,
    rho: float = 1e-2,
    reweighted: bool = True,
    interval: int | None = None,
    **options: Any,
) -> Transform:
    """Prune from dense by ADMM: a third dense, a third ADMM, hard prune, a third retraining.

    Args:
      inner: the optimizer; required, since the penalty passes through it.
      total_steps: number of calls of `update` in the whole training.
      rho: ADMM's penalty coefficient.
      reweighted: weigh the penalty of a weight by 1 / (|w| + m / 10), m the leaf's mean |w|.
      interval: steps between updates of z and u; default a tenth of the ADMM phase.
      **options: of `dstee.transform`.

    References:
      Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction
      Method of Multipliers", 2018, Eq. 7 to 9. Huang et al., 2022, "Graph Neural Network", for
      the three phases.

    Deviations:
      The paper names the reweighting and gives no formula: rho, the weights and the interval
      are ours.
    """
    begin, prune = total_steps // 3, max(2 * total_steps // 3, 2)
    interval = max((prune - begin) // 10, 1) if interval is None else interval
    defaults: Options = {
        "total_steps": total_steps,
        "plan": plans.gradual(0.0, end=0.0),
        "memory": memory.admm(begin, prune, interval),
        "penalty": penalties.admm(rho, begin, prune, reweighted=reweighted),
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "every": prune,
        "stop": 1.0,
        "update_weights": True,
    }
    return transform(inner, **defaults | options)


def _half_to_nearly_none(total_steps: int) -> optax.Schedule:
    """The rate of SNFS, ITOP and GraNet: from 0.5 by cosine to 0.005 at the end."""
    return optax.cosine_decay_schedule(0.5, max(total_steps, 1), alpha=0.01)


def _itop(total_steps: int) -> Options:
    return {
        "total_steps": total_steps,
        "drop_fraction": _half_to_nearly_none(total_steps),
        "stop": 1.0,
        "regrow": True,
        "update_weights": True,
    }
