"""Straight-through estimation: a masked forward pass, whose gradient reaches all weights.

    def loss(params, batch, step):
        done = optax.polynomial_schedule(0.0, 1.0, 3, 10_000)(step)  # from dense, cubic
        masks = straight_through.masks(params, 0.95, share=done)
        return model_loss(straight_through.apply(params, masks), batch)

The parameters that are trained stay dense; the network sees sparse ones, and a weight comes back
when it has grown large enough outside. In the end `masks` are what `dstee.apply_masks` and
`dstee.methods.static(masks=...)` take over.
"""

import jax
import jax.numpy as jnp

from dstee_jax.masks import distributions
from dstee_jax.masks.counts import Sparsity, StackAxes, Where
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.given import check_masks
from dstee_jax.masks.largest import largest_masks
from dstee_jax.masks.where import kernels
from dstee_jax.trees import PyTree, is_dense, mask_leaves


def masks(
    params: PyTree,
    sparsity: Sparsity,
    *,
    share: jax.Array | float = 1.0,
    key: jax.Array | None = None,
    distribution: Distribution = distributions.erk,
    where: Where = kernels,
    stack_axes: StackAxes | None = None,
) -> PyTree:
    """Masks of the largest |w| of each leaf, or random ones.

    Args:
      params: pytree of arrays, the dense parameters.
      sparsity: in [0, 1), or a dict from path to sparsity.
      share: of the way from dense to `sparsity`, in [0, 1]: a leaf of n weights that keeps k in
        the end keeps k + round((1 - share) (n - k)). May be traced.
      key: PRNG key for random masks instead; a fresh one on each step.
      distribution: how the sparsity is shared among the leaves.
      where: `(path, leaf) -> bool`, which leaves are sparse.
      stack_axes: as for `dstee.transform`.

    Returns:
      The structure of `params`: bool arrays with exact counts, `optax.MaskedNode()` where dense.
      Ties go to the lowest index.

    Raises:
      ValueError: `where` selects no leaf, or a leaf would keep no weight.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
      >>> masks(params, 0.75, share=0.5)["kernel"].tolist()  # on the way from 4 to 1: 3 (2.5)
      [[True, True], [True, False]]
    """
    if key is None:
        scores = jax.tree.map(jnp.abs, params)
    else:
        leaves, treedef = jax.tree.flatten(params)
        draws = [
            jax.random.uniform(jax.random.fold_in(key, i), jnp.shape(x), jnp.float32)
            for i, x in enumerate(leaves)
        ]
        scores = jax.tree.unflatten(treedef, draws)
    return largest_masks(
        jax.lax.stop_gradient(scores),
        sparsity,
        share,
        distribution=distribution,
        where=where,
        stack_axes=stack_axes,
    )


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Masked parameters, whose gradient is passed on to all weights as if they were not masked.

    Args:
      params: pytree of arrays, the dense parameters.
      masks: with their structure.

    Returns:
      The structure of `params`; exactly zero where a mask is False.

    Raises:
      ValueError: masks do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> masks = {"w": jnp.array([True, False])}
      >>> jax.value_and_grad(lambda p: apply(p, masks)["w"].sum())({"w": jnp.array([2.0, 3.0])})
      (Array(2., dtype=float32), {'w': Array([1., 1.], dtype=float32)})

    References:
      Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation", 2013, Section 4. Lee et al., "JaxPruner: A Concise Library for
      Sparsity Research", 2023, for sparse training by it.
    """
    check_masks(masks, params)
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, mask_leaves(masks, params), strict=True)
    return jax.tree.unflatten(treedef, [w if is_dense(m) else through(w, m) for w, m in pairs])


def through(w: jax.Array, mask: jax.Array) -> jax.Array:
    """One masked array: w less what is masked, which is a constant to the gradient."""
    return w - jax.lax.stop_gradient(jnp.where(mask, jnp.zeros_like(w), w))
