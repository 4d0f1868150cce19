"""Networks in Flax NNX: the convolutional VGG-19, ResNet-50 and a small one; an MLP."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import dstee_jax as dstee

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm (momentum 0.9), and an optional ReLU."""

    def __init__(self, inputs, outputs, kernel=3, stride=1, *, relu=True, dtype, rngs):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            stride,
            padding=kernel // 2,
            use_bias=False,
            kernel_init=_he_normal,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, dtype=dtype, rngs=rngs)
        self.relu = relu

    def __call__(self, x):
        x = self.norm(self.conv(x))
        return nnx.relu(x) if self.relu else x


class VGG19(nnx.Module):
    """VGG-19 with batch norm: 16 convolutions, a 2 by 2 average pool and one linear layer."""

    PLAN = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)

    def __init__(self, classes, *, dtype, rngs):
        widths = [w for w in self.PLAN if w != "M"]
        pairs = zip([3, *widths], widths, strict=False)
        self.layers = nnx.List([ConvNorm(i, o, dtype=dtype, rngs=rngs) for i, o in pairs])
        self.head = nnx.Linear(512, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        layers = iter(self.layers)
        for width in self.PLAN:
            x = nnx.max_pool(x, (2, 2), (2, 2)) if width == "M" else next(layers)(x)
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class Bottleneck(nnx.Module):
    """ResNet v1.5 bottleneck: the stride is in the 3 by 3 convolution."""

    def __init__(self, inputs, width, stride, *, dtype, rngs):
        block = functools.partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                block(inputs, width, 1),
                block(width, width, 3, stride),
                block(width, 4 * width, 1, relu=False),
            ]
        )
        # The last scale starts at zero: each block is the identity at first.
        self.layers[2].norm.scale[...] = jnp.zeros_like(self.layers[2].norm.scale[...])
        changes = stride != 1 or inputs != 4 * width
        self.shortcut = block(inputs, 4 * width, 1, stride, relu=False) if changes else None

    def __call__(self, x):
        y = x
        for layer in self.layers:
            y = layer(y)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet50(nnx.Module):
    """ResNet-50 v1.5: [3, 4, 6, 3] bottlenecks.

    The stem of large images is a 7 by 7 convolution of stride 2 and a 3 by 3 max pool of stride
    2; that of 32-pixel images (`large=False`) a 3 by 3 convolution.
    """

    def __init__(self, classes, *, large=False, dtype, rngs):
        stem = {"kernel": 7, "stride": 2} if large else {}
        self.stem = ConvNorm(3, 64, **stem, dtype=dtype, rngs=rngs)
        self.large = large
        blocks, inputs = [], 64
        for count, width, stride in [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)]:
            for i in range(count):
                stride_here = stride if i == 0 else 1
                blocks.append(Bottleneck(inputs, width, stride_here, dtype=dtype, rngs=rngs))
                inputs = 4 * width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        if self.large:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Small(nnx.Module):
    """Four strided convolutions and a linear layer, 99 k weights: 10 s an epoch on 2 cores."""

    def __init__(self, classes, *, dtype, rngs):
        pairs = zip((3, 16, 32, 64), (16, 32, 64, 128), strict=True)
        self.layers = nnx.List([ConvNorm(i, o, 3, 2, dtype=dtype, rngs=rngs) for i, o in pairs])
        self.head = nnx.Linear(128, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


class MLP(nnx.Module):
    """Linear layers with a ReLU between them, on images (n, ...) as vectors.

    Images of fewer values than `inputs` are padded with zeros.
    """

    def __init__(self, inputs, widths, classes, *, dtype, rngs):
        init = nnx.initializers.he_normal()
        self.inputs = inputs
        pairs = itertools.pairwise([inputs, *widths, classes])
        self.layers = nnx.List(
            [nnx.Linear(i, o, kernel_init=init, dtype=dtype, rngs=rngs) for i, o in pairs]
        )

    def __call__(self, x, tiles=None):
        """`tiles`: `dstee.Tiles` of each layer but the last, whose kernels then are rectangles."""
        x = x.reshape(len(x), -1)
        x = jnp.pad(x, ((0, 0), (0, self.inputs - x.shape[-1])))
        for layer, at in zip(self.layers[:-1], tiles or [None] * len(self.layers), strict=False):
            y = layer(x) if at is None else linear(x, layer, at)
            x = nnx.relu(y)
        return self.layers[-1](x)


def linear(x, layer, tiles):
    """An `nnx.Linear` whose kernel is in tiles."""
    kernel, bias = layer.kernel.get_value(), layer.bias.get_value()
    x, kernel, bias = (a.astype(layer.dtype) for a in (x, kernel, bias))
    return dstee.matmul(x, kernel, tiles) + bias


MODELS: dict[str, Callable[..., nnx.Module]] = {
    "vgg19": VGG19,
    "resnet50": ResNet50,
    "small": Small,
}


def count_weights(params) -> int:
    """Number of trainable values in a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
