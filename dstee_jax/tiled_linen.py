"""A Flax Linen layer whose kernel may be in tiles: `Dense`.

Needs flax, which `import dstee_jax` does not: `from dstee_jax import tiled_linen`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from dstee_jax.tiling.products import along, matmul
from dstee_jax.tiling.tiles import Tiles


class Dense(nn.Module):
    """`nn.Dense` whose kernel is dense, or the rectangle of its active tiles.

    Which, the collection `tiles` says: what `dstee.tiles` returns, beside `params` in the form of
    `dstee.to_tiles`. Without the collection, or with `dstee.no_tiles`, the kernel is dense. With
    `nn.scan` and `nn.vmap` give it the axis of the parameters: `variable_axes={"params": 0,
    "tiles": 0}`.

    Attributes:
      features: outputs.
      use_bias: whether there is a bias, float, shape (features,).
      dtype: of the computation; by default what input and parameters promote to.
      param_dtype: of the parameters.
      kernel_init: initializer of the kernel.
      bias_init: of the bias.

    Raises:
      ValueError: in the call, if input, kernel and tiles do not fit; names their shapes. Flax's
        ScopeParamShapeError for a rectangle without its tiles.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> from dstee_jax.tiled_linen import Dense
      >>> model, x = Dense(32), jnp.ones((8, 64))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = dstee.transform(optax.adam(1e-2), structure=dstee.structures.tiles((16, 16)),
      ...                      packed=True, sparsity=0.5, total_steps=1000, key=jax.random.key(0))
      >>> tiles = dstee.tiles(tx.init(params), params)
      >>> params = dstee.to_tiles(params, tiles)
      >>> params["kernel"].shape, model.apply({"params": params, "tiles": tiles}, x).shape
      ((2, 32, 16), (8, 32))
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, axis: int = -1) -> jax.Array:
        """Inputs of shape (..., inputs) to (..., features); with `axis=0`, as of `dstee.matmul`,
        of shape (inputs, ...) to (features, ...).
        """
        tiles: Tiles | None = self.get_variable("tiles", "kernel")
        if tiles is None:
            shape = (inputs.shape[axis], self.features)
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        else:
            kernel = self.get_variable("params", "kernel")
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = matmul(inputs, kernel, tiles, axis=axis)
        return y if bias is None else y + along(bias, y, axis)
