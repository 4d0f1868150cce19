"""Medians of functions timed in turn, so that a drifting machine hits all of them alike."""

import itertools
import statistics
import time
from collections.abc import Callable

import jax


def medians(
    functions: dict[str, Callable[[], object]], repeats: int = 7, least: bool = False
) -> dict[str, float]:
    """Median milliseconds of each function, called in turn after one warm-up.

    What a function has as `prepare` is called before it, and not timed. With `least`, the least
    time in place of the median, for a machine on which other programs run.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            getattr(function, "prepare", lambda: None)()
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if round_:
                times[name].append(1e3 * (time.perf_counter() - begin))
    one = min if least else statistics.median
    return {name: one(values) for name, values in times.items()}


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
