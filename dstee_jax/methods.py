"""Methods by name: factories in the way of optax's aliases, made from the parts of `transform`.

Each takes `inner` and the keyword arguments of `dstee.transform`, which override its own
defaults, and returns the same kind of transformation.
"""

from typing import Any, TypeAlias

import optax

from dstee_jax import scores
from dstee_jax.transform import transform

Inner: TypeAlias = optax.GradientTransformation | None
Transform: TypeAlias = optax.GradientTransformationExtraArgs
Options: TypeAlias = dict[str, Any]


def dst_ee(inner: Inner = None, *, c: float = 1e-3, eps: float = 1.0, **options: Any) -> Transform:
    """DST-EE: grow by gradient plus exploration bonus. `transform` with c and eps as arguments.

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Algorithm 1, Eq. 1.
    """
    return transform(inner, grow=scores.acquisition(c, eps), **options)


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
    """Static: the first random mask, kept. No rounds and no counters' growth."""
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


def _itop(total_steps: int) -> Options:
    return {
        "total_steps": total_steps,
        "drop_fraction": optax.cosine_decay_schedule(0.5, max(total_steps, 1), alpha=0.01),
        "stop": 1.0,
        "regrow": True,
        "update_weights": True,
    }
