"""Methods that start dense or denser, and become sparse while they train."""

from typing import Required, Unpack

from dstee_jax.arguments import check_number, check_whole, shown
from dstee_jax.masks.counts import Sparsity
from dstee_jax.methods._common import Inner, Shared, Transform, Untimed, itop, make
from dstee_jax.methods.at_random import mest
from dstee_jax.rules import memory, penalties, plans, scores


class GmpOptions(Shared, total=False):
    """Keyword arguments of `dstee.transform` that `gmp` does not name."""

    total_steps: Required[int]
    sparsity: Sparsity | None


def gmp(
    inner: Inner = None,
    *,
    initial_sparsity: float = 0.0,
    start: float = 0.0,
    stop: float = 0.75,
    overall: bool = False,
    **options: Unpack[GmpOptions],
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
    defaults = {
        "plan": plans.gradual(initial_sparsity, start=start, end=stop, overall=overall),
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "start": start,
        "stop": stop,
        "update_weights": True,
    }
    return make(inner, defaults, options)


def granet(
    inner: Inner = None,
    *,
    total_steps: int,
    initial_sparsity: float = 0.5,
    end: float = 0.5,
    **options: Unpack[Untimed],
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
    defaults = itop(total_steps) | {
        "plan": plans.gradual(initial_sparsity, end=end, overall=True),
        "grow": scores.gradient(),
        "every": 1000,
    }
    return make(inner, defaults, options)


def gap(
    inner: Inner = None, *, total_steps: int, partitions: int = 4, **options: Unpack[Untimed]
) -> Transform:
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
    check_whole("total_steps", total_steps, least=None)
    rotation = plans.rotation(partitions)
    defaults = {
        "total_steps": total_steps,
        "plan": rotation,
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "every": max(int(0.8 * total_steps) // (2 * partitions), 1),
        "stop": 0.8,
        "update_weights": True,
    }
    return make(inner, defaults, options)


class MestEmsOptions(Shared, total=False):
    """Keyword arguments of `dstee.transform` that `mest_ems` does not name."""

    start: float


def mest_ems(
    inner: Inner = None,
    *,
    total_steps: int,
    sparsity: float,
    elastic: float = 1.5,
    stop: float = 0.9,
    gradient_weight: float = 1.0,
    **options: Unpack[MestEmsOptions],
) -> Transform:
    """MEST with its elastic memory (EM&S): as `mest`, from denser masks down to the target.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      sparsity: the final one, a number.
      elastic: how many times the final number of weights is active at first; it falls linearly
        to the target at the last round.
      stop: share of training at which the target is reached and the rounds end.
      gradient_weight: lambda, of `mest`.
      **options: of `dstee.transform`.

    Raises:
      ValueError: `sparsity` is not one number, or `elastic` is below 1.

    References:
      As `mest`.

    Deviations:
      As `mest`. Theirs falls in two steps, at 9/16 and 3/4 of the training, in their scripts from
      1.5 times the weights at 90% sparsity and from 2 times at 95%.
    """
    if not isinstance(sparsity, float | int):
        raise ValueError(f"mest_ems needs one sparsity for the network, not {shown(sparsity)}.")
    check_number("sparsity", sparsity, "0.9")
    check_number("elastic", elastic, "1.5")
    check_number("stop", stop, "0.9")
    if not elastic >= 1:
        raise ValueError(f"elastic={elastic} must be 1 or more: EM&S starts denser than it ends.")
    first = max(1 - elastic * (1 - sparsity), 0.0)
    options.setdefault("plan", plans.gradual(first, end=stop, power=1.0))
    return mest(
        inner,
        total_steps=total_steps,
        sparsity=sparsity,
        stop=stop,
        gradient_weight=gradient_weight,
        **options,
    )


def admm(
    inner: Inner = None,
    *,
    total_steps: int,
    rho: float = 1e-2,
    reweighted: bool = True,
    interval: int | None = None,
    **options: Unpack[Untimed],
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
    check_whole("total_steps", total_steps, least=None)
    begin, prune = total_steps // 3, max(2 * total_steps // 3, 2)
    interval = max((prune - begin) // 10, 1) if interval is None else interval
    defaults = {
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
    return make(inner, defaults, options)
