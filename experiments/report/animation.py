"""The mask of a first layer over a training, round by round, as an animated GIF."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from PIL import Image

import dstee_jax as dstee
from experiments import quickstart

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

SPARSITY = 0.98
# never active, once active, active, grown in the last round
STATES = {"once active": "#CFE3F1", "active": "#333333", "just grown": "#D55E00"}
LIMIT = 500_000  # bytes of the file


class Moment(NamedTuple):
    """The first layer after a round."""

    step: int
    mask: np.ndarray  # (64, 256) bool
    grown: np.ndarray  # the same: active now and not before the round
    explored: np.ndarray  # the same: active at any time
    accuracy: float  # test, percent


def moments(steps: int = quickstart.STEPS) -> Iterator[Moment]:
    """DST-EE on the digits as `experiments.quickstart` trains it, seed 0: before, after each round.

    Args:
      steps: of the training.
    """
    x, y, x_test, y_test = quickstart.load("test")
    rate = optax.cosine_decay_schedule(quickstart.LEARNING_RATE, steps)
    sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
    inner = optax.chain(optax.add_decayed_weights(quickstart.WEIGHT_DECAY), sgd)
    key, options = jax.random.key(0), {"sparsity": SPARSITY} | quickstart.SCHEDULE
    masks = jax.random.fold_in(key, 1)
    tx = dstee.methods.dst_ee(inner, total_steps=steps, key=masks, **options)

    @jax.jit
    def start():
        params = quickstart.init_params(jax.random.fold_in(key, 0))
        state = tx.init(params)
        return dstee.apply_masks(params, state), state

    params, state = start()

    def loss(params, index):
        logits = quickstart.forward(params, x[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    @jax.jit
    def ahead(params, state, begin, end):
        def step(t, carry):
            index = jax.random.randint(jax.random.fold_in(key, t), (quickstart.BATCH,), 0, len(x))
            params, state = carry
            return dstee.apply(tx, jax.grad(loss)(params, index), state, params)

        params, state = jax.lax.fori_loop(begin, end, step, (params, state))
        return params, state, 100 * (quickstart.forward(params, x_test).argmax(-1) == y_test).mean()

    before, done = np.asarray(state.masks["layer_0"]["kernel"]), 0
    for at in (0, *dstee.mask_steps_of(tx), steps):
        params, state, accuracy = ahead(params, state, done, at)
        mask, counter = (
            np.asarray(tree["layer_0"]["kernel"]) for tree in (state.masks, state.counters)
        )
        yield Moment(at, mask, mask & ~before, counter > 0, float(accuracy))
        before, done = mask, at


def frame(moment: Moment) -> Image.Image:
    """One picture: connections of each pixel, and the mask."""
    cells = np.where(moment.explored, 1, 0)
    cells = np.where(moment.mask, np.where(moment.grown, 3, 2), cells)
    figure, axes = plt.subplots(
        1, 2, figsize=(8.4, 2.7), dpi=80, layout="constrained", width_ratios=(1, 3.6)
    )
    fan_out = moment.mask.sum(1).reshape(8, 8)
    axes[0].imshow(fan_out, cmap="cividis", vmin=0, vmax=14)
    axes[0].set_title("connections of a pixel", fontsize=10)
    colors = ListedColormap(["white", *STATES.values()])
    axes[1].imshow(cells, cmap=colors, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    axes[1].set_title(
        f"step {moment.step:4d}: {moment.mask.mean():.1%} active, {moment.explored.mean():4.1%} "
        f"ever, {moment.accuracy:4.1f}% right",
        fontsize=10,
        family="monospace",
    )
    axes[1].set(xlabel="256 hidden units", ylabel="64 pixels")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    named = [Patch(facecolor=color, label=name) for name, color in STATES.items()]
    figure.legend(handles=named, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


def draw(path: Path, steps: int = quickstart.STEPS) -> Path:
    """Write the animation as a GIF.

    Args:
      path: of the file; the suffix is set.
      steps: of the training.
    """
    frames = [frame(moment) for moment in moments(steps)]
    palette = frames[-1].quantize(64)
    small = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in frames]
    path = path.with_suffix(".gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [1000] + [300] * (len(small) - 2) + [2500]  # ms
    small[0].save(path, save_all=True, append_images=small[1:], duration=times, loop=0)
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}: fewer steps.")
    return path
