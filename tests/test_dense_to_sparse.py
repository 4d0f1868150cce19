"""STR's reparameterisation and SIS's layer problem, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dstee_jax import inclusion, soft_threshold

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)


def test_soft_threshold_values_and_gradients():
    w = RNG.normal(size=(5, 4))
    params = {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(4)}
    behind = soft_threshold.init(params, start=-1.0)
    sigma = 1 / (1 + np.exp(1.0))
    expected = np.sign(w) * np.maximum(abs(w) - sigma, 0)
    out = soft_threshold.apply(behind)
    np.testing.assert_allclose(out["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(out["bias"], params["bias"])
    np.testing.assert_allclose(soft_threshold.density(behind), (abs(w) > sigma).mean())

    c = RNG.normal(size=(5, 4))
    grads = jax.grad(lambda p: jnp.sum(soft_threshold.apply(p)["kernel"] * c))(behind)
    alive = abs(w) > sigma
    np.testing.assert_allclose(grads.weights["kernel"], c * alive, atol=1e-6)
    slope = -(c * np.sign(w) * alive).sum() * sigma * (1 - sigma)
    np.testing.assert_allclose(grads.thresholds["kernel"], slope, rtol=1e-5)


def test_soft_threshold_trains_sparser_with_more_decay():
    x = jnp.asarray(RNG.normal(size=(64, 30)), jnp.float32)
    y = x[:, :3] @ jnp.ones((3, 2)) + jnp.asarray(RNG.normal(size=(64, 2)))

    def density(decay):
        params = soft_threshold.init({"kernel": jnp.asarray(RNG.normal(size=(30, 2)) / 5)})
        tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, momentum=0.9))
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            loss = lambda p: jnp.mean((x @ soft_threshold.apply(p)["kernel"] - y) ** 2)  # noqa: E731
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(200):
            params, state = step(params, state)
        return float(soft_threshold.density(params)), soft_threshold.apply(params)["kernel"]

    (little, _), (much, kernel) = density(0.0), density(0.1)
    assert much < little
    assert (np.asarray(kernel)[:3] != 0).all()  # the weights that matter are there
    np.testing.assert_allclose(much, np.mean(np.asarray(kernel) != 0), rtol=1e-6)


def test_soft_threshold_needs_a_leaf():
    with pytest.raises(ValueError, match="where selects none of"):
        soft_threshold.init({"bias": jnp.ones(3)})


def test_residual_is_the_distance_to_the_subdifferential():
    pre, y = RNG.normal(size=200) * 2, np.maximum(RNG.normal(size=200), 0)
    points = -np.linspace(0, 20, 200_001)  # the subdifferential of ReLU's f at 0, finely cut
    for p, out in zip(pre, y, strict=True):
        gap = p - out
        distance = abs(gap) if out > 0 else abs(gap - points).min()
        got = inclusion.residual(jnp.float32(p), jnp.float32(out), "relu")
        np.testing.assert_allclose(abs(float(got)), distance, atol=2e-4)
    same = inclusion.residual(jnp.asarray(pre), jnp.asarray(y), "identity")
    np.testing.assert_allclose(same, pre - y, atol=1e-6)


def test_orthonormal_inputs_keep_the_largest_weights():
    """With x^T x / n = I and zero means the problem falls apart: |w| decides, values stay."""
    n, inputs, outputs = 64, 6, 3
    q, _ = np.linalg.qr(np.concatenate([np.ones((n, 1)), RNG.normal(size=(n, inputs))], axis=1))
    x = np.sqrt(n) * q[:, 1:]
    w, b = RNG.normal(size=(inputs, outputs)), RNG.normal(size=outputs)
    fitted, bias, mask = inclusion.sparsify(
        jnp.asarray(w, jnp.float32),
        jnp.asarray(b, jnp.float32),
        x,
        x @ w + b,
        7,
        activation="identity",
    )
    top = abs(w) >= np.sort(abs(w).ravel())[-7]
    np.testing.assert_array_equal(mask, top)
    np.testing.assert_allclose(fitted, w * top, atol=1e-3)
    np.testing.assert_allclose(bias, b, atol=1e-3)


def test_correlated_inputs_lose_less_than_by_magnitude():
    """Inputs that say the same thing can stand in for each other; magnitude does not see it."""
    x = RNG.normal(size=(300, 5)) @ RNG.normal(size=(5, 15)) + 0.1 * RNG.normal(size=(300, 15))
    w, b = RNG.normal(size=(15, 4)), RNG.normal(size=4)
    y = np.maximum(x @ w + b, 0)
    fitted, bias, mask = inclusion.sparsify(
        jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32), x, y, 24, steps=100
    )
    assert int(mask.sum()) == 24
    assert not np.asarray(fitted)[~np.asarray(mask)].any()
    error = np.mean((np.maximum(x @ fitted + bias, 0) - y) ** 2) / np.mean(y**2)
    magnitude = w * (abs(w) >= np.sort(abs(w).ravel())[-24])
    plain = np.mean((np.maximum(x @ magnitude + b, 0) - y) ** 2) / np.mean(y**2)
    assert error < 0.1 * plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count=0 must be from 1 to 12"),
        ({"inputs": jnp.ones((5, 2))}, "do not fit"),
        ({"activation": "gelu"}, "activation='gelu' is unknown"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "weight": jnp.ones((3, 4)),
        "bias": jnp.ones(4),
        "inputs": jnp.ones((5, 3)),
        "outputs": jnp.ones((5, 4)),
        "count": 2,
    }
    with pytest.raises(ValueError, match=message):
        inclusion.sparsify(**(arguments | change))
