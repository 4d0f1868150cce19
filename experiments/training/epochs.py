"""Epochs over a dataset that lies on the device: the optimizer, the order, few calls."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.training.methods import segments


def cosine_sgd(args: argparse.Namespace, total_steps: int) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9, weight decay, and a learning rate by cosine to zero."""
    schedule = optax.cosine_decay_schedule(args.learning_rate, total_steps)
    return optax.chain(
        optax.add_decayed_weights(args.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def shuffled(key: jax.Array, epoch: Any, size: int, batch: int) -> jax.Array:
    """The images of each step of an epoch: indices (steps, batch), the remainder left out."""
    key = jax.random.fold_in(jax.random.fold_in(key, 3), epoch)
    return jax.random.permutation(key, size)[: size // batch * batch].reshape(-1, batch)


def in_segments(
    steps: Callable[..., tuple[Any, jax.Array]],
    state: Any,
    done: int,
    count: int,
    mask_steps: Sequence[int],
) -> tuple[Any, jax.Array]:
    """The `count` steps after the first `done`: a call for each kind of steps in a row.

    Args:
      steps: `(state, begin, end, mask_step)` to the state after the steps from `begin` to `end`
        of [0, count), and the sum of their losses.
      state: before them.
      done, count, mask_steps: as for `methods.segments`.

    Returns:
      The state after them, and the mean loss.
    """
    total = jnp.zeros(())
    for segment in segments(done, count, mask_steps):
        state, loss = steps(state, *segment)
        total += loss
    return state, total / count
