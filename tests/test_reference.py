"""RigL in ITOP's setting against a training run of ITOP's own PyTorch program.

`data/rigl_itop_digits.npz` is a trace of its `Masking` class (death by magnitude, growth by
gradient, a mask step every 40 of 800 steps, death rate 0.5 by cosine to 0.005) with SGD, lr 0.05,
momentum 0.9, on scikit-learn's digits with a little noise, so that gradients do not tie: an MLP
64-128-10 whose first layer is 10% dense and whose head is dense. Kernels are (inputs, outputs).
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dstee_jax import methods

pytestmark = pytest.mark.optimized
TRACE = Path(__file__).parent / "data" / "rigl_itop_digits.npz"
EVERY, STEPS = 40, 800


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["kernel1"] + params["bias1"])
    logits = hidden @ params["kernel2"] + params["bias2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_rigl_itop_gives_the_masks_of_itops_own_program():
    trace = np.load(TRACE)
    names = ("kernel1", "bias1", "kernel2", "bias2")
    params = {name: jnp.asarray(trace[name]) for name in names}
    x, y = jnp.asarray(trace["x"]), jnp.asarray(trace["y"])
    first, active = trace["gradient_mask0"], int(trace["gradient_mask0"].sum())
    bits = np.unpackbits(trace["gradient_masks"])[: STEPS // EVERY * first.size]
    expected = bits.reshape(-1, *first.shape).astype(bool)

    # Theirs drops ceil(rate * active) weights, ours floor(fraction * active).
    moved = [math.ceil(rate * active) for rate in trace["drop_rates"]]
    fractions = jnp.array([0.0, *((k + 0.5) / active for k in moved)])
    tx = methods.rigl_itop(
        optax.sgd(0.05, momentum=0.9),
        masks={name: first if name == "kernel1" else optax.MaskedNode() for name in names},
        total_steps=STEPS,
        key=jax.random.key(0),
        every=EVERY,
        drop_fraction=lambda count: fractions[count],
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses, masks = [], []
    for t, batch in enumerate(trace["batches"], 1):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        if t % EVERY == 0:
            masks.append(np.asarray(state.masks["kernel1"]))

    assert len(masks) == len(expected) == 20
    for number, (ours, theirs) in enumerate(zip(masks, expected, strict=True), 1):
        assert (ours != theirs).sum() == 0, f"mask {number} differs"
    changed = [int((a & ~b).sum()) for a, b in zip([first, *expected], expected, strict=False)]
    assert changed[0] > 100
    assert sum(changed) > 1000
    np.testing.assert_allclose(losses, trace["gradient_losses"], atol=2e-6)
    np.testing.assert_allclose(params["kernel1"], trace["gradient_kernel1_end"], atol=1e-5)
