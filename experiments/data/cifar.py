"""CIFAR: its splits as arrays; crop and flip on the device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.arrays import Arrays, load

CLASSES = {"cifar10": 10, "cifar100": 100}
# Mean and standard deviation of the channels of CIFAR's training images, in units of 255.
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
SD = np.array([0.2470, 0.2435, 0.2616], np.float32)


def load_splits(dataset: str, data_dir: str | Path, validation: bool) -> tuple[Arrays, Arrays]:
    """Arrays to train on and to evaluate on.

    The second are the test set, or, with `validation`, the last tenth of the training set in a
    fixed random order (the first are then the rest).
    """
    images, labels = load(dataset, "train", data_dir)
    if not validation:
        return (images, labels), load(dataset, "test", data_dir)
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(images) - len(images) // 10
    train, held_out = order[:cut], order[cut:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def normalise(images: jax.Array, dtype=jnp.float32, mean=MEAN, sd=SD) -> jax.Array:
    """uint8 images to zero mean and unit variance per channel."""
    return ((images.astype(jnp.float32) / 255 - mean) / sd).astype(dtype)


def augment(key: jax.Array, images: jax.Array, pad: int = 4) -> jax.Array:
    """Pad by reflection-free zeros, crop at random, flip at random; (n, h, w, c) of any dtype.

    Zero here is the channel mean: call it on normalised images.
    """
    n, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    flip = jax.random.bernoulli(flip_key, 0.5, (n,))
    rows = shift[:, :1] + jnp.arange(height)
    across = jnp.where(flip[:, None], jnp.arange(width)[::-1], jnp.arange(width))
    columns = shift[:, 1:] + across
    return padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
