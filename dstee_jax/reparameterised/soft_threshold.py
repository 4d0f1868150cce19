"""STR: weights behind a learned soft threshold, one for each leaf; sparsity comes out of training.

    params = soft_threshold.init(params, start=-5.0)
    loss = lambda params, batch: model_loss(soft_threshold.apply(params), batch)
    ...                                   # any optax optimizer, with weight decay on everything
    params = soft_threshold.apply(params)  # sparse parameters of the model

`masks` gives the masks of those that are not zero, for `dstee.methods.static(masks=...)`.

It is a reparameterisation, not a transformation: the gradient flows through the threshold, and
no mask is kept. Start and weight decay set the sparsity: `density` says what came out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dstee_jax.masks.counts import Where
from dstee_jax.masks.where import kernels, selected
from dstee_jax.trees import PyTree, is_dense, mask_leaves


class Thresholded(NamedTuple):
    """Parameters to train: weights, and the threshold parameter s of each sparse leaf."""

    weights: PyTree
    thresholds: PyTree  # float32 scalars s; the threshold is sigmoid(s). MaskedNode where dense


def init(params: PyTree, *, start: float = -5.0, where: Where = kernels) -> Thresholded:
    """Put parameters behind a soft threshold.

    Args:
      params: pytree of arrays.
      start: first s of every leaf; the threshold is sigmoid(s), so -5 is 0.0067, in units of a
        weight.
      where: `(path, leaf) -> bool`, which leaves get a threshold.

    Returns:
      The parameters to train, a pytree.

    Raises:
      ValueError: `where` selects no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> params = init({"kernel": jnp.array([[1.5, -0.25], [0.25, -2.0]])}, start=0.0)
      >>> apply(params)["kernel"].tolist()  # the threshold is sigmoid(0) = 0.5
      [[1.0, -0.0], [0.0, -1.5]]

    References:
      Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020,
      Eq. 4 to 6.
    """
    chosen = selected(params, where)
    leaves, treedef = jax.tree.flatten(params)
    nodes: list[Any] = [optax.MaskedNode()] * len(leaves)
    for i in chosen:
        nodes[i] = jnp.float32(start)
    return Thresholded(params, jax.tree.unflatten(treedef, nodes))


def apply(params: Thresholded) -> PyTree:
    """The sparse parameters: sign(w) * relu(|w| - sigmoid(s)) where there is a threshold.

    Args:
      params: from `init`, or trained.

    Returns:
      The structure of `params.weights`, in its dtypes. Differentiable in weights and s.
    """
    leaves, treedef = jax.tree.flatten(params.weights)
    pairs = zip(leaves, mask_leaves(params.thresholds, params.weights), strict=True)
    return jax.tree.unflatten(treedef, [w if is_dense(s) else _shrink(w, s) for w, s in pairs])


def masks(params: Thresholded) -> PyTree:
    """Which weights are above their threshold: masks to train on with, at a fixed sparsity.

    Args:
      params: from `init`, or trained.

    Returns:
      The structure of `params.weights`: a bool array for each leaf that has a threshold,
      `optax.MaskedNode()` for the others. `apply` is zero where a mask is False.

    Example:
      >>> import jax.numpy as jnp
      >>> params = init({"kernel": jnp.array([[1.5, -0.25], [0.25, -2.0]])}, start=0.0)
      >>> masks(params)["kernel"].tolist()
      [[True, False], [False, True]]
    """
    leaves, treedef = jax.tree.flatten(params.weights)
    pairs = zip(leaves, mask_leaves(params.thresholds, params.weights), strict=True)
    above = [s if is_dense(s) else jnp.abs(w) > _threshold(w, s) for w, s in pairs]
    return jax.tree.unflatten(treedef, above)


def density(params: Thresholded) -> jax.Array:
    """Share of weights above their threshold, among all leaves that have one; float32, shape ()."""
    above = jax.tree.leaves(masks(params))
    active = sum(jnp.sum(a, dtype=jnp.float32) for a in above)
    return jnp.asarray(active / sum(a.size for a in above), jnp.float32)


def _threshold(w: jax.Array, s: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(s).astype(w.dtype)


def _shrink(w: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.sign(w) * jax.nn.relu(jnp.abs(w) - _threshold(w, s))
