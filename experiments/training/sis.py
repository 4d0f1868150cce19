"""SIS on the experiments' networks: sparsify each layer of a trained network from its own data."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dstee_jax import inclusion
from dstee_jax.distributions import active_counts
from experiments.training.models import ConvNorm

PRUNE_AT = 2 / 3  # share of the training that is dense; then masks stay as SIS leaves them
ROWS = 4096  # samples (positions of images, for a convolution) that a layer is fitted to


def sparsify_mlp(
    params: dict[str, dict[str, jax.Array]], x: jax.Array, sparsity: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """New parameters and masks of the quickstart's network, from its training images (n, 64)."""
    names = sorted(params)
    counts = active_counts({n: params[n]["kernel"].shape for n in names}, sparsity)
    new, masks = {}, {}
    for name in names:
        layer, last = params[name], name == names[-1]
        pre = x @ layer["kernel"] + layer["bias"]
        y = pre if last else jax.nn.relu(pre)
        kernel, bias, mask = inclusion.sparsify(
            layer["kernel"],
            layer["bias"],
            x,
            y,
            counts[name],
            activation="identity" if last else "relu",
        )
        new[name] = {"kernel": kernel, "bias": bias}
        masks[name] = {"kernel": mask, "bias": optax.MaskedNode()}
        x = y
    return new, masks


def sparsify_model(
    model: nnx.Module, images: jax.Array, sparsity: float
) -> tuple[nnx.State, nnx.State]:
    """New parameters and masks of a network of `experiments.training.models`, in evaluation mode.

    Args:
      model: trained; its kernels, biases and norms are changed in place.
      images: normalised images (n, 32, 32, 3).
      sparsity: in [0, 1), shared among the layers by ERK.
    """
    calls = _run(model, images)
    layers = {path: node for path, node in nnx.iter_graph(model) if path in calls}
    shapes = {path: _kernel(layer)[...].shape for path, layer in layers.items()}
    counts = active_counts({"/".join(map(str, p)): shape for p, shape in shapes.items()}, sparsity)
    masks = {}
    for path, layer in layers.items():
        count = counts["/".join(map(str, path))]
        own = ("conv", "kernel") if isinstance(layer, ConvNorm) else ("kernel",)
        masks[(*path, *own)] = _sparsify_layer(layer, *calls[path], count)

    def mask_of(path, leaf):
        return masks.get(tuple(key.key for key in path), optax.MaskedNode())

    params = nnx.state(model, nnx.Param)
    is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return params, jax.tree_util.tree_map_with_path(mask_of, params, is_leaf=is_leaf)


def _kernel(layer: nnx.Module) -> nnx.Param:
    return layer.conv.kernel if isinstance(layer, ConvNorm) else layer.kernel


def _sparsify_layer(layer: nnx.Module, x: jax.Array, y: jax.Array, count: int) -> jax.Array:
    """Fit one layer in place, its norm folded in; returns the mask, of the kernel's shape."""
    kernel = _kernel(layer)
    if not isinstance(layer, ConvNorm):
        w, bias, mask = inclusion.sparsify(
            kernel[...], layer.bias[...], x, y, count, activation="identity"
        )
        kernel[...], layer.bias[...] = w, bias
        return mask
    norm, strides = layer.norm, layer.conv.strides
    kernel[...], norm.bias[...], mask = _fit_conv(
        kernel[...],
        norm.bias[...],
        norm.mean[...],
        norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon),
        x,
        y,
        strides=strides if isinstance(strides, tuple) else (strides,) * 2,
        count=count,
        activation="relu" if layer.relu else "identity",
        rows=ROWS,
    )
    return mask


@functools.partial(jax.jit, static_argnames=("strides", "count", "activation", "rows"))
def _fit_conv(kernel, bias, mean, scale, x, y, *, strides, count, activation, rows):
    """The kernel, the norm's bias and the mask of a convolution whose norm scales by `scale`."""
    height, width, inputs, outputs = kernel.shape
    scale = jnp.where(jnp.abs(scale) < 1e-6, 1e-6, scale)
    patches = jax.lax.conv_general_dilated_patches(
        x,
        (height, width),
        strides,
        [(height // 2,) * 2, (width // 2,) * 2],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # (n, h, w, inputs * height * width): channels first
    samples, wanted = patches.reshape(-1, patches.shape[-1]), y.reshape(-1, outputs)
    some = np.random.default_rng(0).permutation(len(samples))[:rows]
    folded = (kernel * scale).transpose(2, 0, 1, 3).reshape(-1, outputs)
    w, fitted, mask = inclusion.sparsify(
        folded, bias - mean * scale, samples[some], wanted[some], count, activation=activation
    )

    def back(flat: jax.Array) -> jax.Array:
        return flat.reshape(inputs, height, width, outputs).transpose(1, 2, 0, 3)

    return back(w) / scale, fitted + mean * scale, back(mask)


@nnx.jit
def _run(model: nnx.Module, images: jax.Array) -> dict[tuple, tuple[jax.Array, jax.Array]]:
    """Input and output of every ConvNorm and Linear, by its path in the network."""
    with _recorded() as calls:
        model(images)
    return {path: calls[id(node)] for path, node in nnx.iter_graph(model) if id(node) in calls}


@contextlib.contextmanager
def _recorded() -> Iterator[dict[int, tuple[jax.Array, jax.Array]]]:
    """Input and output of every ConvNorm and Linear that is called meanwhile, by its id."""
    calls: dict[int, tuple[jax.Array, jax.Array]] = {}
    originals: dict[type, Callable] = {t: t.__call__ for t in (ConvNorm, nnx.Linear)}

    def record(original):
        def call(self, x):
            y = original(self, x)
            calls[id(self)] = (x, y)
            return y

        return call

    for kind, original in originals.items():
        kind.__call__ = record(original)
    try:
        yield calls
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
