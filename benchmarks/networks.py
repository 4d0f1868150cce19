"""Trees of parameters, of the sizes of networks."""

import itertools

import jax
import jax.numpy as jnp


def vgg19_shapes(classes: int = 10) -> list[tuple[int, ...]]:
    """Kernel shapes of VGG-19, in order."""
    widths = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
    return [(3, 3, i, o) for i, o in itertools.pairwise(widths)] + [(512, classes)]


def resnet50_shapes(classes: int = 1000) -> list[tuple[int, ...]]:
    """Kernel shapes of the ImageNet ResNet-50, in order."""
    shapes, inputs = [(7, 7, 3, 64)], 64
    for blocks, width in [(3, 64), (4, 128), (6, 256), (3, 512)]:
        for block in range(blocks):
            shapes += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, inputs, 4 * width)] * (block == 0)
            inputs = 4 * width
    return [*shapes, (inputs, classes)]


def random_tree(shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, jax.Array]:
    """Normal float32 arrays of those shapes, as 'layer_00/kernel' and so on."""
    key = jax.random.key(seed)
    return {
        f"layer_{i:02}": {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape)}
        for i, shape in enumerate(shapes)
    }


def shapes_of(shapes: list[tuple[int, ...]], sharding) -> dict:
    """Shapes of a network's kernels and of a bias for each, with shardings."""
    tree = {}
    for i, shape in enumerate(shapes):
        bias = shape[-1:]
        tree[f"layer_{i:02}"] = {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(shape)),
            "bias": jax.ShapeDtypeStruct(bias, jnp.float32, sharding=sharding(bias)),
        }
    return tree
