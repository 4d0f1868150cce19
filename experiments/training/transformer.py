"""A transformer of bytes whose blocks are scanned, dense or with kernels in tiles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import dstee_jax as dstee
from dstee_jax.tiled_nnx import Linear

VOCABULARY = 256


class Attention(nnx.Module):
    """`nnx.MultiHeadAttention` with matrices as kernels, which can be cut in tiles."""

    def __init__(self, heads: int, width: int, *, out_kernel_init: Any, **options: Any):
        linear = functools.partial(Linear, width, width, use_bias=False, **options)
        self.heads = heads
        self.query, self.key, self.value = linear(), linear(), linear()
        self.out = linear(kernel_init=out_kernel_init)

    def __call__(self, x: jax.Array, *, mask: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], self.heads, -1)
        parts = [layer(x).reshape(heads) for layer in (self.query, self.key, self.value)]
        return self.out(nnx.dot_product_attention(*parts, mask=mask).reshape(x.shape))


class Block(nnx.Module):
    """Causal attention, then two dense layers, each behind a norm and beside a residual."""

    def __init__(
        self, layers: int, width: int, heads: int, *, tiled: bool, dtype: Any, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.tiled = tiled
        linear = Linear if tiled else nnx.Linear
        # All 2 * layers branches of the network together add a variance of about 1.
        last = nnx.initializers.variance_scaling(1 / (2 * layers), "fan_in", "truncated_normal")
        self.attention_norm = nnx.RMSNorm(width, **options)
        attention = Attention
        if not tiled:
            attention = functools.partial(nnx.MultiHeadAttention, use_bias=False, decode=False)
        self.attention = attention(heads, width, out_kernel_init=last, **options)
        self.norm = nnx.RMSNorm(width, **options)
        self.up = linear(width, 4 * width, **options)
        self.down = linear(4 * width, width, kernel_init=last, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        if not self.tiled:
            return x + self.down(jax.nn.gelu(self.up(self.norm(x))))
        # Features first: products with tiles give the hidden layer so, and read it so.
        y = jnp.moveaxis(self.norm(x), -1, 0)
        y = self.down(jax.nn.gelu(self.up(y, axis=0)), axis=0)
        return x + jnp.moveaxis(y, 0, -1)


class Transformer(nnx.Module):
    """Bytes (n, length) to logits of the byte after each, (n, length, 256) in float32.

    `tiled`: whether the kernels of the blocks may be in tiles, by `set_tiles`.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        length: int,
        *,
        tiled: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stacked(rngs):
            return Block(layers, width, heads, tiled=tiled, dtype=dtype, rngs=rngs)

        normal = nnx.initializers.normal(0.3)
        self.embedding = nnx.Embed(VOCABULARY, width, embedding_init=normal, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(normal(rngs.params(), (length, width)))
        self.blocks = stacked(rngs)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, dtype=dtype, rngs=rngs)
        self.unroll = jax.default_backend() == "cpu" or 1  # loops of XLA's CPU programs are slow
        self.remat = False  # whether a block is computed again in the backward pass
        self.place = _anywhere  # puts activations (n, length, width) on devices

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        x = x + self.position_embedding[: tokens.shape[1]].astype(x.dtype)
        carry = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
        call = nnx.remat(Block.__call__) if self.remat else Block.__call__
        forward = lambda block, x: call(block, self.place(x))  # noqa: E731
        x = nnx.scan(forward, unroll=self.unroll, **carry)(self.blocks, x)
        return self.head(self.norm(x)).astype(jnp.float32)


def _anywhere(x: jax.Array) -> jax.Array:
    return x


def in_blocks(path: Any, leaf: Any) -> bool:
    """The kernels of the blocks, which become sparse."""
    return dstee.kernels(path, leaf) and "blocks" in jax.tree_util.keystr(path)


def stack_axes(path: Any, leaf: Any) -> tuple[int, ...]:
    """Which axes of a leaf stack layers."""
    return (0,) if "blocks" in jax.tree_util.keystr(path) else ()
