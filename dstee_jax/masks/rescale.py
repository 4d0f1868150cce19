"""Initial scale: make the active weights as large as their smaller fan-in asks for."""

import jax
import jax.numpy as jnp

from dstee_jax.masks.given import fitting_masks
from dstee_jax.rules.units import input_axes
from dstee_jax.trees import PyTree, is_dense, mask_leaves


def rescale(
    params: PyTree, masks: PyTree, *, per_unit: bool = False, output_axis: int = -1
) -> PyTree:
    """Multiply the weights of each sparse leaf by sqrt(dense fan-in / active fan-in).

    Initialisers choose the variance of a weight from the fan-in of the dense layer. With 5% of
    the weights active, the variance of a unit's input is 5% of what was meant; this restores
    it. Networks with batch or layer norm need it less. An option, not a default:
    docs/results.md says what it changed.

    Args:
      params: pytree of arrays, freshly initialised.
      masks: masks with the structure of `params`, or an optimizer state that holds them.
      per_unit: use the active fan-in of each output unit instead of the mean of the leaf; a
        unit without any active weight is left as it is.
      output_axis: of the units: -1 for kernels (..., inputs, outputs), as Flax has them, 0 for
        (outputs, inputs, ...), as Equinox and PyTorch have them.

    Returns:
      `params`, rescaled in their own dtypes, and zero where a mask is False.

    Raises:
      ValueError: masks and parameters do not have the same structure.

    References:
      Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", 2022,
      Eq. 2.
    """

    def scaled(leaf: jax.Array, mask: jax.Array) -> jax.Array:
        axes = input_axes(mask.shape, output_axis) if per_unit else None
        share = jnp.mean(mask, axis=axes, keepdims=True, dtype=jnp.float32)
        factor = jnp.sqrt(1.0 / jnp.where(share > 0, share, 1.0))
        return jnp.where(mask, leaf * factor.astype(leaf.dtype), jnp.zeros_like(leaf))

    for tree in fitting_masks(masks, params):
        leaves, treedef = jax.tree.flatten(params)
        flat = zip(leaves, mask_leaves(tree, params), strict=True)
        new = [leaf if is_dense(mask) else scaled(leaf, mask) for leaf, mask in flat]
        params = jax.tree.unflatten(treedef, new)
    return params
