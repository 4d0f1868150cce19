"""Scales of updates: a warm start against an Adam in NumPy that counts each weight's own steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import methods, scales, scores, structures

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)
STEPS, EVERY = 24, 6
OPTIONS = dict(sparsity=0.6, total_steps=STEPS, every=EVERY, stop=1.0, key=KEY)


def draws(step, shape):
    return np.random.default_rng(step).normal(size=shape).astype(np.float32)


def run(tx, shape=(8, 10), steps=STEPS):
    params = {"kernel": jax.random.normal(KEY, shape), "bias": jnp.ones(shape[-1])}
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    step = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    history = [(params, state)]
    for t in range(1, steps + 1):
        grads = {name: jnp.asarray(draws(t, x.shape)) for name, x in params.items()}
        params, state = step(grads, state, params)
        history.append((params, state))
    return history


@pytest.mark.parametrize("update_weights", [False, True])
@pytest.mark.parametrize("betas", [None, (0.9, 0.999), (0.8, 0.95)])
def test_smet_is_adam_with_each_weights_own_step(betas, update_weights):
    b1, b2 = betas or (0.9, 0.999)
    warm, rate = 4, 0.01
    tx = methods.smet(
        optax.adam(rate, b1, b2, eps=1e-30),
        warm_up=warm,
        betas=betas,
        update_weights=update_weights,
        **OPTIONS,
    )
    history = run(tx)
    w, m, v = (np.zeros((8, 10)) for _ in range(3))
    w[:] = history[0][0]["kernel"]
    mask = np.asarray(history[0][1].masks["kernel"])
    own = np.zeros(mask.shape, int)  # steps since growth, as Adam counts: all of them
    first = mask.copy()  # active from the start, all along
    moved = 0
    for t in range(1, STEPS + 1):
        due = t % EVERY == 0
        own += mask
        if not due or update_weights:
            g = draws(t, mask.shape) * mask
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            steps = np.where(first, t, np.maximum(own, 1)) if betas else t
            step = m / (1 - b1**steps) / np.sqrt(np.maximum(v / (1 - b2**steps), 1e-30))
            w -= rate * np.where(first, 1, np.minimum(own / warm, 1)) * step * mask
        if due:
            new = np.asarray(history[t][1].masks["kernel"])
            changed = new ^ mask
            assert changed.any()
            assert new.sum() == mask.sum()
            w[changed], m[changed], v[changed], own[changed] = 0, 0, 0, 0
            first &= new & mask
            mask, moved = new, moved + changed.sum() / 2
        np.testing.assert_allclose(history[t][0]["kernel"], w, atol=2e-5)
    assert moved >= 10
    # The schedule: 0.2 by cosine to 0.005, of 32 weights.
    angle = np.pi * EVERY / STEPS
    k = int(32 * 0.2 * (0.975 * (0.5 * (1 + np.cos(angle))) + 0.025))
    assert (history[EVERY][1].masks["kernel"] & ~history[0][1].masks["kernel"]).sum() == k


def test_without_the_option_nothing_is_kept_or_computed():
    make = lambda **o: dstee.transform(optax.adam(0.01), **OPTIONS, **o)  # noqa: E731
    params = {"kernel": jnp.ones((8, 10))}
    assert make().init(params).rule_state == ()

    def program(tx):
        step = lambda g, s, p: dstee.apply(tx, g, s, p, mask_step=False)  # noqa: E731
        return str(jax.make_jaxpr(step)(params, tx.init(params), params))

    assert program(make()) == program(make(scale=None))
    assert len(program(make(scale=scales.warm_up(3)))) > len(program(make()))
    one = make(scale=lambda leaf: jnp.ones(()))
    for (a, _), (b, _) in zip(run(make(), steps=13), run(one, steps=13), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_step_of_growth_is_kept():
    for options in ({}, {"structure": structures.tiles((2, 2))}):
        tx = methods.rigl(optax.sgd(0.1), scale=scales.warm_up(3), **(OPTIONS | options))
        history = run(tx)
        kinds = ([s.masks for _, s in history], [s.rule_state.grown for _, s in history])
        masks, ats = ([np.asarray(tree["kernel"]) for tree in trees] for trees in kinds)
        assert not ats[0].any()
        grown = 0
        for t in range(1, STEPS + 1):
            new = masks[t] & ~masks[t - 1]
            assert t % EVERY == 0 or not new.any()
            assert (ats[t][new] == t).all()
            np.testing.assert_array_equal(ats[t][~new], ats[t - 1][~new])
            grown += new.sum()
        assert grown >= (2 if options else 5), grown
        dstee.check(tx, history[-1][1], history[-1][0])


def test_density_is_that_of_the_leaf_and_of_its_layers():
    for shape in ((8, 10), (3, 8, 10)):
        tx = dstee.transform(
            optax.sgd(0.1),
            scale=scales.density(),
            sparsity={"kernel": 0.75},
            stack_axes=lambda path, leaf: (0,) if leaf.ndim == 3 else (),
            total_steps=10,
            every=None,
            key=KEY,
        )
        (before, state), (after, _) = run(tx, shape, 1)
        step = -0.1 * draws(1, shape) * np.asarray(state.masks["kernel"])
        moved = np.asarray(after["kernel"] - before["kernel"])
        np.testing.assert_allclose(moved, 2 * step, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after["bias"], 1 - 0.1 * draws(1, shape[-1:]))


def test_scores_see_when_weights_grew():
    """The youngest weights go first."""
    options = {"scale": lambda leaf: jnp.ones(()), "drop": lambda leaf: -1.0 * leaf.grown}
    tx = dstee.transform(optax.sgd(0.1), grow=scores.random(), **(OPTIONS | options))
    *_, (_, old), (_, new) = run(tx, steps=2 * EVERY)
    gone = np.asarray(old.masks["kernel"] & ~new.masks["kernel"])
    assert gone.any()
    at = np.asarray(old.rule_state.grown["kernel"])
    assert (at[gone] == EVERY).all()


def test_as_the_last_link_of_a_chain():
    double = dstee.transform(scale=lambda leaf: jnp.full((), 2.0), grow=scores.random(), **OPTIONS)
    tx = optax.chain(optax.sgd(0.1), double)
    params = {"kernel": jnp.ones((8, 10)), "bias": jnp.ones(10)}
    state = tx.init(params)
    mask = dstee.get_state(state).masks["kernel"]
    updates, _ = tx.update(params, state, dstee.apply_masks(params, state), grad=params)
    np.testing.assert_allclose(updates["kernel"], -0.2 * mask, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-6)


def test_carried_over_weights_that_grow_then():
    tx = dstee.transform(optax.sgd(0.1), scale=scales.warm_up(3), **OPTIONS)
    denser = dstee.transform(
        optax.sgd(0.1), scale=scales.warm_up(3), **(OPTIONS | {"sparsity": 0.3})
    )
    params, state = run(tx, steps=8)[-1]
    after = dstee.carry_over(state, denser, params)
    new = np.asarray(after.masks["kernel"] & ~state.masks["kernel"])
    at, before = (np.asarray(s.rule_state.grown["kernel"]) for s in (after, state))
    assert (at[new] == 8).all()
    np.testing.assert_array_equal(at[~new], before[~new])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scales.warm_up(0), "steps=0 must be 1 or more"),
        (lambda: scales.own_bias_correction(1.0), "b1=1.0 and b2=0.999 must be in"),
        (
            lambda: dstee.transform(optax.sgd(0.1), packed=True, scale=scales.warm_up(), **OPTIONS),
            "scale= looks at all weights of a leaf, packed=True at the active ones",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
