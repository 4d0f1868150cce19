"""SIS: sparsify a trained layer so that its outputs still follow from its inputs.

A layer y = R(W x + b), where R is the proximity operator of a convex function f (ReLU, identity),
is the inclusion W x + b - y in df(y). SIS looks for the W of least l1 norm for which, on samples
of a trained network, that inclusion nearly holds:

    min |W|_1  subject to  mean over samples of dist(W x + b - y, df(y))^2 <= eta.

Each layer is a problem of its own, with the inputs and outputs of the dense network.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from dstee_jax.selection.bisection import largest_of_all

Activation = Literal["relu", "identity"]


def residual(pre: jax.Array, outputs: jax.Array, activation: Activation) -> jax.Array:
    """What lies between W x + b - y and the subdifferential of f at y, entry by entry.

    Identity: df(y) = {0}. ReLU: {0} where y > 0, and (-inf, 0] where y = 0, so that any
    negative pre-activation will do there.

    Args:
      pre: W x + b, float array.
      outputs: y, of the same shape; for ReLU 0 or more.
      activation: `'relu'` or `'identity'`.
    """
    gap = pre - outputs
    return gap if activation == "identity" else jnp.where(outputs > 0, gap, jax.nn.relu(pre))


@functools.partial(jax.jit, static_argnames=("count", "activation", "steps", "levels"))
def sparsify(
    weight: jax.Array,
    bias: jax.Array,
    inputs: jax.Array,
    outputs: jax.Array,
    count: int,
    *,
    activation: Activation = "relu",
    steps: int = 20,
    levels: int = 24,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sparsify one layer to exactly `count` weights.

    Follows the l1 path: from the largest penalty, under which W = 0, down by a factor of 1.5 a
    level, `steps` accelerated proximal-gradient steps each, until `count` weights are non-zero;
    keeps the `count` of largest |w| times the scale of their input, and fits those once more
    without the penalty.

    Args:
      weight: float array (inputs, outputs).
      bias: float array (outputs,); stays dense.
      inputs: float array (samples, inputs), what the dense network feeds the layer.
      outputs: float array (samples, outputs), what the layer made of it, after its activation.
      count: how many weights to keep, in [1, weight.size].
      activation: `'relu'` or `'identity'`.
      steps: of each level; 10 times as many for the last fit.
      levels: of the penalty, at most.

    Returns:
      `(weight, bias, mask)`: the fitted weight and bias, and where the weight may be non-zero
      (bool; exactly `count`).

    Raises:
      ValueError: shapes do not fit, or count is out of range.

    References:
      Verma and Pesquet, "Sparsifying Networks via Subdifferential Inclusion", 2021, Problem 2.

    Deviations:
      Derived from the problem statement: the constraint is moved into the objective (one
      penalty for each eta) and solved by FISTA, where the authors use Douglas-Rachford
      splitting with a subgradient projection; and the count is set, not eta. Their stopping
      rules and the choice of eta could not be checked.
    """
    if inputs.shape[1:] != weight.shape[:1] or outputs.shape != (len(inputs), weight.shape[1]):
        raise ValueError(
            f"weight {weight.shape}, inputs {inputs.shape} and outputs {outputs.shape} do not fit: "
            "pass (in, out), (samples, in) and (samples, out)."
        )
    if not 1 <= count <= weight.size:
        raise ValueError(f"count={count} must be from 1 to {weight.size}, the number of weights.")
    if activation not in ("relu", "identity"):
        raise ValueError(f"activation={activation!r} is unknown: use 'relu' or 'identity'.")

    ones = jnp.ones((len(inputs), 1), inputs.dtype)
    inputs = jnp.concatenate([inputs, ones], axis=1)  # the bias is one more row of weights
    start = jnp.zeros_like(weight, shape=(len(weight) + 1, len(bias))).at[-1].set(bias)

    def gradient(w: jax.Array) -> jax.Array:
        return inputs.T @ residual(inputs @ w, outputs, activation) / len(inputs)

    # The largest eigenvalue of the inputs' second moment bounds the curvature.
    moment = inputs.T @ inputs / len(inputs)
    power = lambda _, v: moment @ v / (jnp.linalg.norm(moment @ v) + 1e-30)  # noqa: E731
    v = jax.lax.fori_loop(0, 30, power, jnp.ones(len(moment)) / len(moment) ** 0.5)
    size = 1 / (1.05 * jnp.linalg.norm(moment @ v) + 1e-30)

    def fista(w: jax.Array, prox, steps: int) -> jax.Array:
        def step(_, carry):
            w, ahead, t = carry
            new = prox(ahead - size * gradient(ahead))
            after = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            return new, new + (t - 1) / after * (new - w), after

        return jax.lax.fori_loop(0, steps, step, (w, w, jnp.float32(1)))[0]

    largest = jnp.abs(gradient(start)[:-1]).max()

    def level(i: jax.Array, w: jax.Array) -> jax.Array:
        shrink = size * largest * 1.5 ** -(i + 1.0)
        soft = lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - shrink)  # noqa: E731
        enough = jnp.sum(w[:-1] != 0) >= count
        new = fista(w, lambda x: soft(x).at[-1].set(x[-1]), steps)
        return jnp.where(enough, w, new)

    path = jax.lax.fori_loop(0, levels, level, start)
    scale = jnp.sqrt(jnp.diagonal(moment))[:-1, None]
    (mask,) = largest_of_all([jnp.abs(path[:-1]) * scale], count)
    free = jnp.concatenate([mask, jnp.ones((1, len(bias)), bool)])
    keep = lambda x: jnp.where(free, x, 0)  # noqa: E731
    fitted = fista(keep(path), keep, 10 * steps)
    return fitted[:-1], fitted[-1], mask
