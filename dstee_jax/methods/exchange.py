"""Methods that keep the count of every leaf and grow by gradient; and the one of a fixed mask."""

from typing import Unpack

from dstee_jax.methods._common import Inner, Options, Transform, Untimed, itop, make
from dstee_jax.rules import scores
from dstee_jax.rules.ablation import Exempt, ablation


def static(inner: Inner = None, **options: Unpack[Options]) -> Transform:
    """Static: the first mask, kept: random, or `masks=` from `dstee.at_init`. No rounds.

    Args:
      inner: the optimizer.
      **options: of `dstee.transform`.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.static(optax.sgd(0.1), sparsity=0.9, total_steps=500,
      ...                           key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      []

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", 2018, which compares SET with it.
    """
    return make(inner, {"every": None}, options)


def rigl(inner: Inner = None, **options: Unpack[Options]) -> Transform:
    """RigL: drop by magnitude, grow by absolute gradient; alpha 0.3, ΔT 100, stop at 0.75.

    Args:
      inner: the optimizer.
      **options: of `dstee.transform`; alpha is `drop_fraction`, ΔT `every`.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.rigl(optax.sgd(0.1), sparsity=0.9, total_steps=500, every=150,
      ...                         key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [150, 300]

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, Algorithm 1.

    Deviations:
      Ties in the drop score go to the lowest index; the authors' code breaks them by noise of
      1e-5.
    """
    return make(inner, {"grow": scores.gradient(), "regrow": True}, options)


def rigl_itop(inner: Inner = None, *, total_steps: int, **options: Unpack[Untimed]) -> Transform:
    """RigL in ITOP's setting: optimizer step first, rate 0.5 by cosine to 0.005, no early stop.

    `every` is 4000 (CIFAR and ImageNet).

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      **options: of `dstee.transform`.

    References:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021, Section 4.

    Deviations:
      k is rounded down, theirs up; first masks have exact counts, theirs are Bernoulli draws.
    """
    defaults = itop(total_steps) | {"grow": scores.gradient(), "every": 4000}
    return make(inner, defaults, options)


def srigl(
    inner: Inner = None,
    *,
    gamma: float = 0.3,
    of_dense: bool = False,
    exempt: Exempt = lambda name, shape: False,
    output_axis: int = -1,
    **options: Unpack[Options],
) -> Transform:
    """SRigL: RigL with a constant fan-in, and units of few salient weights ablated.

    Args:
      inner: the optimizer.
      gamma: share of a unit's active inputs that must be salient; 0.95 for vision transformers.
      of_dense, exempt, output_axis: of `structures.ablation`, which has the rule. Exempt the last
        layer.
      **options: of `dstee.transform`; `grow_batches=n` is their accumulation of gradients.

    Raises:
      ValueError: gamma is negative.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> tx = dstee.methods.srigl(optax.sgd(0.1), sparsity=0.9, total_steps=400,
      ...                          key=jax.random.key(0),
      ...                          exempt=lambda name, shape: "head" in name)
      >>> params = {"body": {"kernel": jnp.ones((20, 8))}, "head": {"kernel": jnp.ones((8, 6))}}
      >>> tx.init(params).masks["body"]["kernel"].sum(0).tolist()
      [2, 2, 2, 2, 2, 2, 2, 2]

    References:
      Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2024, Section 3.1, and its
      code.

    Deviations:
      Those of `structures.ablation`; as `rigl`.
    """
    structure = ablation(gamma, of_dense=of_dense, exempt=exempt, output_axis=output_axis)
    defaults = {"grow": scores.gradient(), "regrow": True, "structure": structure}
    return make(inner, defaults, options)


def dst_ee(
    inner: Inner = None,
    *,
    c: float = 1e-3,
    eps: float = 1.0,
    normalize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """DST-EE: drop by magnitude, grow by |gradient| + c ln(t) / (N + eps).

    t is the step, N in how many rounds the weight was active: what has been active seldom grows
    more easily. These are the defaults of `dstee.transform` itself.

    Args:
      inner: the optimizer.
      c: the weight of exploration, 0 or more; 0 is growth by gradient alone. 1e-3 is where the
        sweeps of docs/defaults.md are flat; it is in units of a gradient.
      eps: above 0; with a small one the bonus of never-active weights hides their gradient.
      normalize: divide gradients by their leaf's mean first, so that c has no unit; 0.1 is then a
        fair start.
      **options: of `dstee.transform`; `regrow=True` lets what was just dropped come back.

    Raises:
      ValueError: c is negative or eps is not positive.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.dst_ee(optax.sgd(0.1), sparsity=0.9, total_steps=500, c=3e-3,
      ...                           key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [100, 200, 300]

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Algorithm 1, Eq. 1.

    Deviations:
      Those of `scores.acquisition`. The paper gives no c, drop fraction, ΔT or last round.
    """
    return make(inner, {"grow": scores.acquisition(c, eps, normalize=normalize)}, options)
