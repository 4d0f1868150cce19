"""Which leaves are sparse."""

from typing import Any

import jax.numpy as jnp

from dstee_jax.trees import path_name

_DENSE_NAMES = ("bias", "scale", "embedding")


def kernels(path: Any, leaf: Any) -> bool:
    """The default of `where`: kernels of dense, convolution and attention layers.

    True for arrays of 2 dimensions and more whose path has no part that contains 'bias',
    'scale' or 'embedding'.

    Args:
      path: key path of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: array or `jax.ShapeDtypeStruct`.
    """
    if getattr(leaf, "ndim", 0) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return not any(word in path_name(path).lower() for word in _DENSE_NAMES)
