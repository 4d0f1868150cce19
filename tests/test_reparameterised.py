"""Powerpropagation, straight-through estimation and Top-KAST against NumPy, and how they end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import powerpropagation, soft_threshold, straight_through, top_kast

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)


def make_params():
    return {
        "a": {"kernel": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "bias": jnp.ones(5)},
        "b": {"kernel": jnp.asarray(3 * RNG.normal(size=(5, 8)), jnp.float32)},
    }


def top(w, k):
    """The k largest |w|, index by index."""
    flat = np.abs(np.asarray(w)).ravel()
    mask = np.zeros(flat.size, bool)
    mask[sorted(range(flat.size), key=lambda i: (-flat[i], i))[:k]] = True
    return mask.reshape(np.shape(w))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4.0])
def test_powerpropagation_values_and_gradients(alpha):
    params = make_params()
    params["a"]["kernel"] = params["a"]["kernel"].at[0, :2].set(0.0)
    theta = powerpropagation.init(params, alpha=alpha)
    back = powerpropagation.apply(theta, alpha=alpha)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), back, params)
    c = RNG.normal(size=(6, 5))

    def loss(p):
        return jnp.sum(powerpropagation.apply(p, alpha=alpha)["a"]["kernel"] * c)

    grad = jax.grad(loss)(theta)["a"]["kernel"]
    t = np.asarray(theta["a"]["kernel"], np.float64)
    np.testing.assert_allclose(grad, c * alpha * abs(t) ** (alpha - 1), rtol=1e-4, atol=1e-6)
    curvature = jax.jvp(jax.grad(loss), (theta,), (jax.tree.map(jnp.ones_like, theta),))[1]
    assert np.isfinite(curvature["a"]["kernel"]).all()
    np.testing.assert_array_equal(theta["a"]["bias"], params["a"]["bias"])


def test_powerpropagation_prunes_on_w():
    theta = powerpropagation.init(make_params(), alpha=3.0)
    masks = powerpropagation.masks(theta, 0.7, distribution=dstee.uniform)
    for layer, k in (("a", 9), ("b", 12)):
        w = powerpropagation.apply(theta, alpha=3.0)[layer]["kernel"]
        np.testing.assert_array_equal(masks[layer]["kernel"], top(w, k))
    masks = powerpropagation.masks(theta, {"a/kernel": 0.9, "b/kernel": 0.8})
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [3, 8]


@pytest.mark.optimized(False)
def test_powerpropagation_is_pruned_by_gmp():
    """theta is sparse exactly where the network's parameters are, at every step."""
    theta = powerpropagation.init(make_params(), alpha=2.0)
    tx = dstee.methods.gmp(
        optax.adam(0.1), sparsity=0.7, total_steps=20, every=4, key=jax.random.key(0)
    )
    state = tx.init(theta)

    def seen(theta):
        return powerpropagation.apply(theta, alpha=2.0)

    @jax.jit
    def step(theta, state):
        grads = jax.grad(lambda t: sum(jnp.sum((w - 1) ** 2) for w in jax.tree.leaves(seen(t))))
        return dstee.apply(tx, grads(theta), state, theta)

    for _ in range(20):
        theta, state = step(theta, state)
        for layer in theta:
            mask = np.asarray(state.masks[layer]["kernel"])
            np.testing.assert_array_equal(np.asarray(seen(theta)[layer]["kernel"]) != 0, mask)
    np.testing.assert_allclose(dstee.density(state), 0.3, atol=0.01)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_straight_through_masks_on_the_way_from_dense(share):
    params = make_params()
    masks = jax.jit(
        lambda p, s: straight_through.masks(p, 0.7, share=s, distribution=dstee.uniform)
    )(params, share)
    for layer, k in (("a", 9), ("b", 12)):
        w = params[layer]["kernel"]
        expected = k + round((1 - share) * (w.size - k))
        np.testing.assert_array_equal(masks[layer]["kernel"], top(w, expected))
    assert masks["a"]["bias"] == optax.MaskedNode()


def test_straight_through_random_masks_have_exact_counts_and_change():
    params = make_params()
    draws = [
        straight_through.masks(params, 0.7, key=jax.random.key(i), distribution=dstee.uniform)
        for i in (0, 1, 0)
    ]
    kernels = [np.asarray(m["b"]["kernel"]) for m in draws]
    assert {int(m.sum()) for m in kernels} == {12}
    assert (kernels[0] != kernels[1]).any()
    assert (kernels[0] == kernels[2]).all()


def test_ties_go_to_the_lowest_index():
    ones = {"kernel": jnp.ones((4, 5))}
    mask = straight_through.masks(ones, 0.7)["kernel"]
    np.testing.assert_array_equal(mask.ravel(), np.arange(20) < 6)
    sets = top_kast.sets({"kernel": -jnp.ones((4, 5))}, 0.7, 0.5)
    np.testing.assert_array_equal(sets.forward["kernel"].ravel(), np.arange(20) < 6)
    np.testing.assert_array_equal(sets.backward["kernel"].ravel(), np.arange(20) < 10)


def test_each_stacked_layer_keeps_its_own():
    params = {"kernel": jnp.asarray(RNG.normal(size=(3, 4, 5)) * [[[1]], [[10]], [[100]]])}
    masks = straight_through.masks(params, 0.75, stack_axes=lambda path, leaf: (0,))
    for w, mask in zip(params["kernel"], masks["kernel"], strict=True):
        np.testing.assert_array_equal(mask, top(w, 5))


@pytest.mark.optimized(False)
def test_straight_through_trains_dense_weights_under_a_sparse_forward_pass():
    params, target = make_params(), make_params()
    tx = optax.sgd(0.05)
    state = tx.init(params)
    w = {x: np.asarray(params[x]["kernel"], np.float64) for x in params}
    c = {x: np.asarray(target[x]["kernel"], np.float64) for x in params}

    @jax.jit
    def step(params, state):
        masks = straight_through.masks(params, 0.7, distribution=dstee.uniform)

        def loss(p):
            seen = straight_through.apply(p, masks)
            return sum(jnp.sum((seen[x]["kernel"] - target[x]["kernel"]) ** 2) for x in seen)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state, straight_through.apply(params, masks)

    for _ in range(10):
        params, state, seen = step(params, state)
        for x, k in (("a", 9), ("b", 12)):
            mask = top(w[x], k)
            assert not np.asarray(seen[x]["kernel"])[~mask].any()
            w[x] = w[x] - 0.05 * 2 * (w[x] * mask - c[x])
            np.testing.assert_allclose(params[x]["kernel"], w[x], rtol=1e-4, atol=1e-5)


def test_top_kast_values_gradients_and_penalty():
    params = make_params()
    sets = jax.jit(lambda p: top_kast.sets(p, 0.8, 0.5))(params)
    c = {x: RNG.normal(size=np.shape(params[x]["kernel"])) for x in params}
    rate = 0.01

    def loss(p):
        seen = top_kast.apply(p, sets)
        value = sum(jnp.sum(seen[x]["kernel"] * c[x]) for x in seen)
        return value + top_kast.penalty(p, sets, rate)

    value, grads = jax.value_and_grad(loss)(params)
    expected = 0.0
    for x in params:
        w = np.asarray(params[x]["kernel"], np.float64)
        a, b = top(w, round(0.2 * w.size)), top(w, round(0.5 * w.size))
        np.testing.assert_array_equal(sets.forward[x]["kernel"], a)
        np.testing.assert_array_equal(sets.backward[x]["kernel"], b)
        seen = np.asarray(top_kast.apply(params, sets)[x]["kernel"])
        np.testing.assert_array_equal(seen, np.where(a, params[x]["kernel"], 0))
        weight = np.where(a, 1, np.where(b, 1 / 0.2, 0))
        expected += (w * a * c[x]).sum() + rate * (weight * abs(w)).sum()
        slope = c[x] * b + rate * weight * np.sign(w)
        np.testing.assert_allclose(grads[x]["kernel"], slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.asarray(grads["a"]["bias"]).any()


def test_a_distribution_that_gives_a_leaf_less_keeps_a_within_b():
    def odd(shapes, sparsity):
        return {name: 0.9 - sparsity if name[0] == "a" else sparsity for name in shapes}

    sets = top_kast.sets(make_params(), 0.8, 0.5, distribution=odd)
    for a, b in zip(*map(jax.tree.leaves, sets), strict=True):
        assert not (a & ~b).any()


@pytest.mark.parametrize("name", ["powerpropagation", "straight_through", "top_kast", "soft"])
def test_masks_at_the_end_are_taken_over(name):
    params = make_params()
    masks = {
        "powerpropagation": lambda: powerpropagation.masks(params, 0.8),
        "straight_through": lambda: straight_through.masks(params, 0.8),
        "top_kast": lambda: top_kast.sets(params, 0.8, 0.5).forward,
        "soft": lambda: soft_threshold.masks(soft_threshold.init(params, start=1.5)),
    }[name]()
    tx = dstee.methods.static(optax.adam(0.1), masks=masks, total_steps=5, key=jax.random.key(0))
    state, params = tx.init(params), dstee.apply_masks(params, masks)
    for _ in range(3):
        params, state = dstee.apply(tx, jax.tree.map(jnp.ones_like, params), state, params)
    for layer in ("a", "b"):
        mask = np.asarray(masks[layer]["kernel"])
        assert mask.any()
        assert not np.asarray(params[layer]["kernel"])[~mask].any()


def test_soft_threshold_masks_are_what_apply_leaves():
    behind = soft_threshold.init(make_params(), start=0.0)
    seen, masks = soft_threshold.apply(behind), soft_threshold.masks(behind)
    for layer in ("a", "b"):
        np.testing.assert_array_equal(seen[layer]["kernel"] != 0, masks[layer]["kernel"])
    assert masks["a"]["bias"] == optax.MaskedNode()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_stay(dtype):
    with jax.numpy_dtype_promotion("strict"):
        params = jax.tree.map(lambda x: x.astype(dtype), make_params())
        theta = powerpropagation.init(params, alpha=2.0)
        sets = top_kast.sets(params, 0.8, 0.5)
        outs = [
            theta,
            powerpropagation.apply(theta, alpha=2.0),
            straight_through.apply(params, straight_through.masks(params, 0.8, share=0.5)),
            top_kast.apply(params, sets),
        ]
        assert {x.dtype for x in jax.tree.leaves(outs)} == {jnp.dtype(dtype)}
        assert top_kast.penalty(params, sets).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: powerpropagation.init(p, alpha=0.5), "alpha=0.5 must be 1 or more"),
        (lambda p: powerpropagation.apply(p, alpha=float("inf")), "alpha=inf must be 1 or more"),
        (lambda p: powerpropagation.init(p["a"]["bias"], alpha=2.0), "where selects none of"),
        (lambda p: powerpropagation.masks(p, 1.0), "it must be in \\[0, 1\\)"),
        (lambda p: straight_through.masks(p, 1.5), "it must be in \\[0, 1\\)"),
        (lambda p: straight_through.masks(p["a"]["bias"], 0.5), "where selects none of"),
        (lambda p: straight_through.apply(p, {"a": jnp.ones(3, bool)}), "masks have nothing for"),
        (lambda p: top_kast.sets(p, 0.5, 0.8), "backward_sparsity=0.8 is above sparsity=0.5"),
        (lambda p: top_kast.penalty(p, top_kast.sets(p, 0.8, 0.5), -1.0), "coefficient=-1.0 must"),
        (
            lambda p: top_kast.apply(p, top_kast.Sets({}, {})),
            "masks have nothing for",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_params())
