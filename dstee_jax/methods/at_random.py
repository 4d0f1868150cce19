"""Methods that keep the count of every leaf and grow at random."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import check_number
from dstee_jax.methods._common import (
    Inner,
    Options,
    Transform,
    Untimed,
    cosine,
    halved_at,
    halved_by_thirds,
    itop,
    make,
)
from dstee_jax.rules import memory, penalties, plans, scales, scores


def set(inner: Inner = None, *, zeta: float | None = None, **options: Unpack[Options]) -> Transform:
    """SET: drop by magnitude, grow at random; just-dropped weights may come back.

    Args:
      inner: the optimizer.
      zeta: None is the version that RigL compares with: magnitude, RigL's schedule. A number is
        SET as published: this share of the positive weights and of the negative ones, each the
        smallest, to the end of the training, the optimizer first. The authors' is 0.3.
      **options: of `dstee.transform`; as published `every` is the steps of an epoch, and the
        output layer dense (`where=`).

    Raises:
      ValueError: zeta is out of range, or given together with `drop_fraction` or `drop`.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.set(optax.sgd(0.1), zeta=0.3, every=50, sparsity=0.9, total_steps=200,
      ...                        key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [50, 100, 150, 200]

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018, Algorithm 1; as in Evci et al., 2020.

    Deviations:
      With zeta the number of drops is floor(zeta n) of all n weights of a leaf; theirs rounds the
      positive and the negative ones. New weights start at zero, theirs at random.
    """
    defaults: dict[str, Any] = {"grow": scores.random(), "regrow": True}
    if zeta is not None:
        check_number("zeta", zeta, "0.3")
        if not 0 < zeta <= 1:
            raise ValueError(f"zeta={zeta} must be a share of the weights in (0, 1], as 0.3.")
        _alone("zeta", options, "drop_fraction", "drop")
        constant = optax.constant_schedule(zeta)
        published = {"drop_fraction": constant, "stop": 1.0, "update_weights": True}
        defaults |= {"drop": scores.two_sided(zeta)} | published
    return make(inner, defaults, options)


def set_itop(inner: Inner = None, *, total_steps: int, **options: Unpack[Untimed]) -> Transform:
    """SET in ITOP's setting: as `rigl_itop`, with random growth and `every` 1500.

    References:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, Section 4.

    Deviations:
      As `rigl_itop`.
    """
    defaults = itop(total_steps) | {"grow": scores.random(), "every": 1500}
    return make(inner, defaults, options)


def mest(
    inner: Inner = None,
    *,
    total_steps: int,
    gradient_weight: float = 1.0,
    mutation: float | None = None,
    **options: Unpack[Untimed],
) -> Transform:
    """MEST (EM): drop by |w| + lambda |g|, grow at random.

    The drop fraction steps down: 0.3, then 0.15 and 0.075 after each third of the training.
    `every` is 1950, five epochs of CIFAR at batch 128.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      gradient_weight: lambda; 0.5 in the authors' code.
      mutation: a share of all weights of a layer, active or not, in place of the drop fraction:
        that many move in a round until 9/16 of the training, half as many until 3/4, where rounds
        end. In the authors' scripts 0.02 at 90% sparsity, 0.01 at 95%. Not with `packed`.
      **options: of `dstee.transform`.

    Raises:
      ValueError: mutation is out of range, or given together with `drop_fraction` or `plan`.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.mest(optax.sgd(0.1), mutation=0.02, every=50, sparsity=0.9,
      ...                         total_steps=200, key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [50, 100, 150]

    References:
      Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
      Edge", 2021, Section 3, and its code (github.com/boone891214/MEST).

    Deviations:
      EM drops and grows in one exchange, where theirs prunes below the target and grows back: the
      same masks. The default drop fraction is ours.
    """
    if mutation is not None:
        check_number("mutation", mutation, "0.02")
        if not 0 < mutation <= 1:
            raise ValueError(f"mutation={mutation} must be a share of all weights, as 0.02.")
        _alone("mutation", options, "drop_fraction", "plan")
    check_number("gradient_weight", gradient_weight, "1.0")
    defaults = {
        "total_steps": total_steps,
        "drop": scores.magnitude_and_gradient(gradient_weight),
        "grow": scores.random(),
        "drop_fraction": halved_by_thirds(total_steps),
        "every": 1950,
        "stop": 0.9,
        "update_weights": True,
    }
    if mutation is not None:
        shares = halved_at(round(9 / 16 * total_steps), mutation)
        of_all = plans.exchange(of_all=True)
        defaults |= {"plan": of_all, "drop_fraction": shares, "stop": 0.75}
    return make(inner, defaults, options)


def smet(
    inner: Inner = None,
    *,
    total_steps: int,
    warm_up: int = 100,
    betas: tuple[float, float] | None = (0.9, 0.999),
    **options: Unpack[Untimed],
) -> Transform:
    """SMET: drop by magnitude, grow at random, and warm up what has just grown.

    A grown weight counts its own steps, for Adam's bias correction and for a ramp of its update
    over `warm_up` steps. The drop fraction goes from 0.2 by cosine to 0.005.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      warm_up: W, 100 as `every`.
      betas: Adam's, `(b1, b2)` of `inner`; None if it is not of its kind.
      **options: of `dstee.transform`; `scale=` in place of the warm start, as
        `scales.product(scales.warm_up(), scales.density())` for the density-aware rate.

    Raises:
      ValueError: `warm_up` or `betas` are out of range, or `inner` has no moments of Adam's kind.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.smet(optax.adam(1e-3), sparsity=0.9, total_steps=400,
      ...                         key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [100, 200, 300, 400]

    References:
      SMET, 2026, and its code (github.com/QiaoXiao7282/SMET).

    Deviations:
      Those of `scales.warm_up` and `scales.own_bias_correction`. Theirs trains blocks of weights,
      with embeddings and head dense (`where=`). The density-aware rate is off, as in their code.
    """
    check_number("warm_up", warm_up, "100")
    if betas is not None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be (b1, b2), as (0.9, 0.999), or None.")
    ramp = [scales.warm_up(warm_up)]
    corrections = [] if betas is None else [scales.own_bias_correction(*betas)]
    defaults = {
        "total_steps": total_steps,
        "grow": scores.random(),
        "scale": scales.product(*ramp, *corrections),
        "drop_fraction": cosine(total_steps, 0.2, 0.025),
        "stop": 1.0,
    }
    made = make(inner, defaults, options)
    if betas is not None and inner is not None and "scale" not in options:
        _check_adam(inner, betas)
    return made


def deep_r(
    inner: Inner = None, *, l1: float = 1e-5, noise: float = 1e-5, **options: Unpack[Options]
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
    defaults = {
        "plan": plans.below_zero(),
        "memory": memory.signs(),
        "penalty": penalties.l1_with_noise(l1, noise),
        "drop": scores.along_sign(),
        "grow": scores.random(),
        "every": 1,
        "stop": 1.0,
        "update_weights": True,
    }
    return make(inner, defaults, options)


def _alone(name: str, options: Mapping[str, Any], *others: str) -> None:
    """Raise a ValueError if an option is given whose part another one plays."""
    both = [other for other in others if other in options]
    if both:
        raise ValueError(f"{name}= stands for {both[0]}=: leave one of them out.")


def _check_adam(inner: Any, betas: Any) -> None:
    """Raise a ValueError if the inner optimizer keeps no `mu` and `nu`, tried on four weights."""
    try:
        state = jax.eval_shape(inner.init, jax.ShapeDtypeStruct((2, 2), jnp.float32))
    except Exception:
        return  # takes no such tree: labels by name
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    if not all(any(f".{name}" in path for path in paths) for name in ("mu", "nu")):
        raise ValueError(
            f"betas={betas} correct the two moments of Adam, which the inner optimizer does not "
            "keep: pass betas=None, or optax.adam or adamw."
        )
