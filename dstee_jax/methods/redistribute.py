"""Methods that keep the total, and move counts between the leaves."""

from typing import Unpack

import optax

from dstee_jax.arguments import check_whole
from dstee_jax.methods._common import (
    Inner,
    Options,
    Transform,
    Untimed,
    half_to_nearly_none,
    make,
)
from dstee_jax.rules import memory, plans, scores
from dstee_jax.rules.sampling import subset


def snfs(
    inner: Inner = None, *, total_steps: int, decay: float = 0.9, **options: Unpack[Untimed]
) -> Transform:
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
    defaults = {
        "total_steps": total_steps,
        "plan": plans.redistribute(scores.momentum()),
        "memory": memory.dense_momentum(decay),
        "grow": scores.momentum(),
        "drop_fraction": half_to_nearly_none(total_steps),
        "every": 390,
        "stop": 1.0,
        "update_weights": True,
    }
    return make(inner, defaults, options)


def dsr(
    inner: Inner = None, *, total_steps: int, threshold: float = 1e-3, **options: Unpack[Untimed]
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
    check_whole("total_steps", total_steps, least=None)
    defaults = {
        "total_steps": total_steps,
        "plan": plans.adaptive_threshold(threshold),
        "grow": scores.random(),
        "drop_fraction": optax.constant_schedule(0.1),
        "every": lambda step: 100 * 2 ** min(4 * step // max(total_steps, 1), 3),
        "stop": 0.95,
        "update_weights": True,
    }
    return make(inner, defaults, options)


def gse(inner: Inner = None, *, share: float = 1.0, **options: Unpack[Options]) -> Transform:
    """GSE: grow by absolute gradient in a random subset of the weights, over all layers together.

    The drop fraction is 0.2, by cosine to 0 at 0.6 of the training; as many of the weights of
    smallest magnitude are dropped. `every` is 1000.

    Args:
      inner: the optimizer.
      share: candidates for each active weight of a layer; of `scores.subset`.
      **options: of `dstee.transform`; `grow_batches=n` for the mean gradient of several batches.

    Raises:
      ValueError: share is not above 0.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.gse(optax.sgd(0.1), sparsity=0.95, total_steps=5000,
      ...                        key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [1000, 2000, 3000]

    References:
      Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic
      Exploration", 2024, Algorithm 1, and its code (github.com/mikeheddes/
      guided-stochastic-exploration).

    Deviations:
      Those of `scores.subset`: a dense gradient is made, of the mask step's own batch. Theirs grows
      first and then prunes what was active before, which gives the same masks as one exchange; no
      leaf loses its last weight. The optimizer steps before the round, theirs after it.
    """
    defaults = {
        "plan": plans.exchange(overall=True),
        "grow": subset(scores.gradient(), share),
        "drop_fraction": 0.2,
        "every": 1000,
        "stop": 0.6,
        "update_weights": True,
    }
    return make(inner, defaults, options)
