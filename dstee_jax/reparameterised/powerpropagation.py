"""Powerpropagation: w = theta |theta|^(alpha - 1), under which the rich get richer.

    theta = powerpropagation.init(params, alpha=2.0)
    loss = lambda theta, batch: model_loss(powerpropagation.apply(theta, alpha=2.0), batch)
    ...                                    # any optax optimizer on theta
    params = powerpropagation.apply(theta, alpha=2.0)

The gradient of theta is alpha |theta|^(alpha - 1) times that of w: small weights move little, end
near zero, and pruning them costs less. theta has the structure of the parameters, is zero where w
is, and is ordered by magnitude as w is: `dstee.methods.gmp` and `static` around theta's optimizer
prune theta as they would w. At theta = 0 the gradient is zero, so that a weight that starts there
never moves: methods that grow weights (RigL, SET, DST-EE) do not go with alpha above 1.
"""

import math

import jax
import jax.numpy as jnp

from dstee_jax.masks import distributions
from dstee_jax.masks.counts import Sparsity, StackAxes, Where
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.largest import largest_masks
from dstee_jax.masks.where import kernels, selected
from dstee_jax.trees import PyTree


def init(params: PyTree, *, alpha: float, where: Where = kernels) -> PyTree:
    """The theta whose w are these parameters: sign(w) |w|^(1 / alpha).

    Args:
      params: pytree of arrays, freshly initialised as usual.
      alpha: 1 or more; 1 is no reparameterisation. The paper tries 1 to 5 on MNIST; 2 is a start.
      where: `(path, leaf) -> bool`, which leaves; the others stay as they are.

    Returns:
      The structure and dtypes of `params`: what to train.

    Raises:
      ValueError: alpha is below 1 or not finite, or `where` selects no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> theta = init({"kernel": jnp.array([[4.0, -9.0]])}, alpha=2.0)
      >>> theta["kernel"].tolist()
      [[2.0, -3.0]]
      >>> apply(theta, alpha=2.0)["kernel"].tolist()
      [[4.0, -9.0]]

    References:
      Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", 2021,
      Section 2 and the authors' code.
    """
    _check(alpha)
    return _each(params, 1 / alpha, where)


def apply(params: PyTree, *, alpha: float, where: Where = kernels) -> PyTree:
    """The parameters that the network sees: theta |theta|^(alpha - 1).

    Args:
      params: theta, from `init` or trained.
      alpha: that of `init`.
      where: that of `init`.

    Returns:
      The structure and dtypes of `params`. Differentiable; the gradient at theta = 0 is 0 (1 for
      alpha = 1).

    Raises:
      ValueError: as `init`.
    """
    _check(alpha)
    return _each(params, alpha, where)


def masks(
    params: PyTree,
    sparsity: Sparsity,
    *,
    distribution: Distribution = distributions.erk,
    where: Where = kernels,
    stack_axes: StackAxes | None = None,
) -> PyTree:
    """Masks of the largest |w| of each leaf, of theta or of w: their order is the same.

    For one threshold over all leaves take `dstee.at_init.magnitude(None, apply(...), None, s)`.

    Args:
      params: theta, trained.
      sparsity: in [0, 1), or a dict from path to sparsity: in the paper the output layer keeps
        twice the share of the others.
      distribution: how the sparsity is shared among the leaves.
      where: that of `init`.
      stack_axes: as for `dstee.transform`.

    Returns:
      Masks for `dstee.apply_masks` and `dstee.methods.static(masks=...)`.

    Raises:
      ValueError: `where` selects no leaf, or a leaf would keep no weight.

    Example:
      >>> import jax.numpy as jnp
      >>> masks({"kernel": jnp.array([[1.0, -3.0], [2.0, 0.0]])}, 0.5)["kernel"].tolist()
      [[False, True], [True, False]]
    """
    size = jax.tree.map(jnp.abs, params)
    return largest_masks(
        size, sparsity, distribution=distribution, where=where, stack_axes=stack_axes
    )


def _check(alpha: float) -> None:
    if not 1 <= alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be 1 or more: 1 changes nothing, 2 is usual.")


def _each(params: PyTree, exponent: float, where: Where) -> PyTree:
    chosen = set(selected(params, where))
    leaves, treedef = jax.tree.flatten(params)
    new = [_power(jnp.asarray(x), exponent) if i in chosen else x for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, new)


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """sign(x) |x|^exponent. Zeros are left out before the power, whose gradient there is NaN."""
    if exponent == 1:
        return x
    some = jnp.where(x == 0, jnp.ones_like(x), x)
    return jnp.where(x == 0, jnp.zeros_like(x), jnp.sign(some) * jnp.abs(some) ** exponent)
