import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dstee_jax as dstee
from dstee_jax import methods, scores
from tests import oracle

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)


def make_params(dtype=jnp.float32):
    k1, k2 = jax.random.split(jax.random.key(7))
    return {
        "a": {"kernel": jax.random.normal(k1, (12, 20), dtype), "bias": jnp.ones(20, dtype)},
        "b": {"kernel": jax.random.normal(k2, (20, 5), dtype), "bias": jnp.ones(5, dtype)},
    }


def gradients(params, seed):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(draws)


def run(tx, params, steps, opt_state=None, first=0):
    if opt_state is None:
        opt_state = tx.init(params)
        params = dstee.apply_masks(params, opt_state)
    update = jax.jit(tx.update)
    for step in range(first, first + steps):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.mark.parametrize("method", ["dst_ee", "rigl"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_agrees_with_the_numpy_oracle(method, sparsity):
    params = make_params()
    grow = {"dst_ee": scores.acquisition(0.3, 1.0), "rigl": scores.gradient()}[method]
    tx = dstee.transform(
        optax.sgd(0.1, momentum=0.9),
        sparsity=sparsity,
        total_steps=40,
        key=KEY,
        every=4,
        stop=0.75,
        drop_fraction=0.37,
        grow=grow,
        regrow=method == "rigl",
    )
    opt_state = tx.init(params)
    oracles = {
        name: oracle.Sgd(
            np.asarray(params[name]["kernel"]),
            np.asarray(opt_state.masks[name]["kernel"]),
            method=method,
            lr=0.1,
            momentum=0.9,
            every=4,
            stop=30,
            alpha=0.37,
            c=0.3,
        )
        for name in params
    }
    params = dstee.apply_masks(params, opt_state)
    update = jax.jit(tx.update)
    for step in range(40):
        grads = gradients(params, step)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, reference in oracles.items():
            reference.step(np.asarray(grads[name]["kernel"]))
            np.testing.assert_array_equal(opt_state.masks[name]["kernel"], reference.mask)
            np.testing.assert_array_equal(opt_state.counters[name]["kernel"], reference.counter)
            np.testing.assert_allclose(params[name]["kernel"], reference.w, atol=2e-6)


@pytest.mark.parametrize("regrow", [False, True])
def test_set_agrees_with_the_numpy_oracle(regrow):
    """SET: smallest magnitudes out, uniformly random places in."""
    params = make_params()
    tx = methods.set(optax.sgd(0.1), sparsity=0.8, total_steps=20, key=KEY, every=4, regrow=regrow)
    params, state = run(tx, params, 3)
    _, after = run(tx, params, 1, state, first=3)
    k = int(np.float32(0.3 / 2 * (1 + np.cos(np.pi * 4 / 15))) * state.masks["a"]["kernel"].sum())
    # The documented stream: key, then step, leaf in order (a/bias, a/kernel, ...), 1 for growth.
    draw = KEY
    for number in (4, 1, 1):
        draw = jax.random.fold_in(draw, number)
    mask, weight = np.asarray(state.masks["a"]["kernel"]), np.asarray(params["a"]["kernel"])
    score = np.asarray(jax.random.uniform(draw, mask.shape))
    expected = oracle.drop_and_grow(mask, abs(weight), score, k, regrow)
    np.testing.assert_array_equal(after.masks["a"]["kernel"], expected)


@pytest.mark.optimized(False)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it may last for all examples
)
@given(
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    method=st.sampled_from([methods.dst_ee, methods.rigl, methods.set, methods.set_itop]),
    every=st.integers(2, 5),
)
def test_counts_hold_and_inactive_weights_are_zero(sparsity, dtype, method, every):
    params = make_params(dtype)
    tx = method(optax.adam(0.01), sparsity=sparsity, total_steps=20, key=KEY, every=every)
    opt_state = tx.init(params)
    # Without apply_masks: the first update alone makes the parameters sparse.
    counts = [int(m.sum()) for m in jax.tree.leaves(opt_state.masks)]
    previous, update = opt_state, jax.jit(tx.update)
    for step in range(20):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
        assert [int(m.sum()) for m in jax.tree.leaves(opt_state.masks)] == counts
        for name in params:
            mask = opt_state.masks[name]["kernel"]
            assert params[name]["kernel"].dtype == dtype
            assert not jnp.any(jnp.where(mask, 0, params[name]["kernel"]))
            before, after = (s.counters[name]["kernel"] for s in (previous, opt_state))
            assert jnp.all(after >= before)
            for moment in (opt_state.inner_state[0].mu, opt_state.inner_state[0].nu):
                assert not jnp.any(jnp.where(mask, 0, moment[name]["kernel"]))
        previous = opt_state


def test_counters_count_rounds_and_saturate():
    params = {"kernel": jnp.ones((4, 4))}
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.5, total_steps=100, key=KEY, every=2)
    state = tx.init(params)
    top = jnp.full((4, 4), 65_534, jnp.uint16)
    _, state = run(tx, params, 4, state._replace(counters={"kernel": top}))
    assert state.counters["kernel"].dtype == jnp.uint16
    assert int(state.counters["kernel"].max()) == 65_535
    assert int(state.counters["kernel"].min()) >= 65_534


def test_mask_step_updates_no_parameter():
    params = make_params()
    tx = dstee.transform(optax.adam(0.1), sparsity=0.8, total_steps=20, key=KEY, every=3)
    params, state = run(tx, params, 2)
    new_params, new_state = run(tx, params, 1, state, first=2)
    np.testing.assert_array_equal(new_params["a"]["bias"], params["a"]["bias"])
    mask = state.masks["a"]["kernel"] & new_state.masks["a"]["kernel"]
    assert (state.masks["a"]["kernel"] != new_state.masks["a"]["kernel"]).any()
    for before, after in [
        (params, new_params),
        (state.inner_state[0].mu, new_state.inner_state[0].mu),
    ]:
        before, after = before["a"]["kernel"], after["a"]["kernel"]
        np.testing.assert_array_equal(after, jnp.where(mask, before, 0))
    assert int(new_state.inner_state[0].count) == 3  # bias correction goes on


def test_update_weights_steps_first_then_changes_masks():
    params = make_params()
    tx = dstee.transform(
        optax.sgd(0.1),
        sparsity=0.8,
        total_steps=20,
        key=KEY,
        every=1,
        update_weights=True,
        regrow=True,
        grow=scores.gradient(),
    )
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    grads = gradients(params, 0)
    updates, new_state = tx.update(grads, state, params)
    mask = np.asarray(state.masks["a"]["kernel"])
    stepped = np.asarray(params["a"]["kernel"] - 0.1 * grads["a"]["kernel"] * mask)
    k = int(0.3 * (1 + np.cos(np.pi / 15)) / 2 * mask.sum())
    new = oracle.drop_and_grow(mask, abs(stepped), abs(np.asarray(grads["a"]["kernel"])), k, True)
    np.testing.assert_array_equal(new_state.masks["a"]["kernel"], new)
    after = optax.apply_updates(params, updates)["a"]["kernel"]
    np.testing.assert_allclose(after, stepped * (mask & new), atol=1e-7)


def test_learning_rate_schedule_reaches_its_end():
    schedule = optax.cosine_decay_schedule(1.0, 20)
    tx = dstee.transform(
        optax.inject_hyperparams(optax.sgd)(learning_rate=schedule),
        sparsity=0.8,
        total_steps=20,
        key=KEY,
        every=3,
    )
    _, state = run(tx, make_params(), 20)
    rate = state.inner_state.hyperparams["learning_rate"]
    np.testing.assert_allclose(rate, schedule(19), rtol=1e-6)


def test_sparsity_zero_is_the_inner_optimizer():
    params, inner = make_params(), optax.adamw(0.01)
    tx = dstee.transform(inner, sparsity=0.0, total_steps=12, key=KEY, every=3)
    ours, _ = run(tx, params, 12)
    theirs, state, update = params, inner.init(params), jax.jit(inner.update)
    for step in range(12):
        updates, state = update(gradients(theirs, step), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_last_link_of_a_chain_takes_the_raw_gradient():
    params = make_params()
    make = functools.partial(methods.rigl, sparsity=0.8, total_steps=20, key=KEY, every=3)
    chain = optax.chain(optax.sgd(0.1), make())
    wrapped = make(optax.sgd(0.1))
    state, wrapped_state = chain.init(params), wrapped.init(params)
    ours = theirs = dstee.apply_masks(params, state)
    update, wrapped_update = jax.jit(chain.update), jax.jit(wrapped.update)
    for step in range(10):
        grads = gradients(params, step)
        updates, state = update(grads, state, ours, grad=grads)
        ours = optax.apply_updates(ours, updates)
        updates, wrapped_state = wrapped_update(grads, wrapped_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="Pass the raw gradient"):
        jax.jit(chain.update)(grads, state, params)
    with pytest.raises(ValueError, match="Pass the raw gradient"):
        chain.update(grads, chain.init(params), params)  # not jitted: on the first step
    # A rule that reads no gradient needs none.
    random = optax.chain(
        optax.sgd(0.1), methods.set(sparsity=0.8, total_steps=20, key=KEY, every=3)
    )
    random.update(grads, random.init(params), params)


def test_extra_args_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = dstee.transform(inner, sparsity=0.5, total_steps=10, key=KEY, every=2)
    params = {"kernel": jnp.ones((4, 4))}
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, value=3.0)
    np.testing.assert_array_equal(updates["kernel"], jnp.where(state.masks["kernel"], 3.0, -1.0))


def test_multisteps_scores_the_accumulated_mean():
    params = {"kernel": jax.random.normal(KEY, (8, 8))}
    single = methods.rigl(optax.sgd(0.1), sparsity=0.5, total_steps=8, key=KEY, every=2)
    multi = optax.MultiSteps(single, 2)
    state, multi_state = single.init(params), multi.init(params)
    ours = theirs = dstee.apply_masks(params, state)
    update, multi_update = jax.jit(single.update), jax.jit(multi.update)
    for step in range(8):
        parts = [gradients(params, 2 * step + i) for i in range(2)]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
        updates, state = update(mean, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        for part in parts:
            updates, multi_state = multi_update(part, multi_state, ours)
            ours = optax.apply_updates(ours, updates)
        masks = dstee.get_state(multi_state).masks
        np.testing.assert_array_equal(masks["kernel"], state.masks["kernel"])
        np.testing.assert_allclose(ours["kernel"], theirs["kernel"], atol=1e-6)


def test_nan_gradients_keep_the_counts():
    params = make_params()
    tx = dstee.transform(optax.sgd(0.0), sparsity=0.8, total_steps=20, key=KEY, every=2)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, state = tx.update(params, state, params)
    _, after = tx.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, after.masks, state.masks)
    grads["a"]["kernel"] = grads["a"]["kernel"].at[0].set(1.0)
    _, after = tx.update(grads, state, params)
    grown = after.masks["a"]["kernel"] & ~state.masks["a"]["kernel"]
    assert grown[0].any()
    assert not grown[1:].any()
    assert after.masks["a"]["kernel"].sum() == state.masks["a"]["kernel"].sum()


def test_given_masks():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    masks = {"kernel": jnp.eye(4, dtype=bool), "bias": optax.MaskedNode()}
    tx = dstee.transform(optax.sgd(0.1), masks=masks, total_steps=20, key=KEY, every=2)
    state = tx.init(params)
    np.testing.assert_array_equal(state.masks["kernel"], np.eye(4))
    _, state = run(tx, params, 10, state)
    assert state.masks["kernel"].sum() == 4


def test_given_masks_are_copied():
    params = {"kernel": jnp.ones((4, 4))}
    mine = np.eye(4, dtype=bool)
    tx = dstee.transform(optax.sgd(0.1), masks={"kernel": mine}, total_steps=20, key=KEY, every=2)
    mine[:] = True
    _, state = run(tx, params, 4)
    assert state.masks["kernel"].sum() == 4
    with pytest.raises(ValueError, match="masks= is traced"):
        jax.jit(
            lambda m: dstee.transform(masks={"kernel": m}, total_steps=20, key=KEY).init(params)
        )(mine)


def test_a_parameter_named_as_a_step_count():
    params = {"count": jnp.array(1.0), "kernel": jnp.ones((4, 4))}
    tx = dstee.transform(optax.adam(0.1), sparsity=0.5, total_steps=20, key=KEY, every=2)
    _, state = run(tx, params, 4)
    assert int(state.inner_state[0].count) == 4


def test_scores_in_double_precision_and_empty_leaves():
    params = {"kernel": jnp.ones((6, 6)), "empty": jnp.ones((0, 4))}
    tx = methods.rigl(optax.sgd(0.1), sparsity=0.5, total_steps=20, key=KEY, every=2)
    _, state = run(tx, params, 4)
    assert int(state.masks["kernel"].sum()) == 18
    assert "empty " in dstee.summary(state).replace("empty units", "")
    with jax.enable_x64(True):
        score = jnp.array([1.0, 1.0 + 1e-12, 0.0, 0.0])
        mask = jnp.array([False, False, True, True])
        new = dstee.drop_and_grow(mask, score, score, 1, k_max=1)
        assert new.tolist() == [False, True, False, True]


def test_bad_arguments():
    make = functools.partial(
        dstee.transform, inner=optax.sgd(0.1), sparsity=0.5, total_steps=1000, key=KEY
    )
    for options, message in [
        ({"total_steps": 0}, "total_steps=0"),
        ({"every": 0}, "every=0"),
        ({"every": 1}, "update_weights=True"),
        ({"every": 2000}, "no mask step"),
        ({"every": lambda step: 2000}, "no step of every, whose first is 2000, lies within"),
        ({"start": 0.9}, "stop=0.75 is before start=0.9"),
        ({"stop": 1.5}, r"in \[0, 1\]"),
        ({"drop_fraction": 1.2}, "drop_fraction=1.2"),
        ({"drop_fraction": lambda count: 0.01 * count}, "schedule goes from 1.0"),
        ({"key": 0}, r"jax.random.key\(0\)"),
        ({"sparsity": None}, "sparsity=None"),
        ({"sparsity": 95}, "sparsity is 95"),
        ({"sparsity": {"kernel": 1.0}}, "sparsity of kernel is 1.0"),
        ({"masks": {"kernel": jnp.ones(3, bool)}}, "give one"),
        ({"sparsity": None, "masks": optax.MaskedNode()}, "no mask in it"),
        ({"key": jnp.array(0)}, "not one PRNG key"),
        ({"inner": optax.adam}, "call it"),
        ({"every": 750}, "cosine has reached zero"),
        ({"every": 2.5}, "every=2.5"),
        ({"counter_init": "ones"}, "counter_init='ones'"),
        ({"counter_update": "both"}, "counter_update='both'"),
        ({"counter_dtype": jnp.int8}, "counter_dtype"),
        ({"selection": "sort"}, "selection='sort'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    for options in ({"c": -1.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            scores.acquisition(**options)


def test_bad_trees():
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.5, total_steps=1000, key=KEY)
    params = make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="opt_state is a dict, not what init returned: the order"):
        tx.update(params, params, state)
    with pytest.raises(ValueError, match="different structures"):
        tx.update(params["a"], state, params)
    with pytest.raises(ValueError, match="selects none of the leaves"):
        tx.init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds 0 SparseStates"):
        dstee.get_state(optax.sgd(0.1).init(params))
    for mask, message in [
        (jnp.ones((4, 4)), "dtype float32"),
        (jnp.ones((4, 5), bool), r"shape \(4, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            dstee.transform(optax.sgd(0.1), masks={"kernel": mask}, total_steps=1000, key=KEY).init(
                {"kernel": jnp.ones((4, 4))}
            )
    with pytest.raises(ValueError, match="masks have nothing for a/bias"):
        dstee.apply_masks(params, {"c": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="which params do not have"):
        dstee.apply_masks({"a": jnp.ones(3)}, {"a": jnp.ones(3, bool), "c": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        dstee.rescale({"kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones(4, bool)})
    with pytest.raises(ValueError, match="same name"):
        dstee.init_masks({"a/w": jnp.ones((4, 4)), "a": {"w": jnp.ones((9, 9))}}, 0.5, KEY)
    with pytest.raises(ValueError, match="not one PRNG key"):
        dstee.init_masks({"a": jnp.ones((4, 4))}, 0.5, 0)


def test_empty_units_are_counted():
    mask = jnp.zeros((3, 3, 2, 5), bool).at[0, 1, 0, 3].set(True).at[2, 2, 1, 0].set(True)
    assert int(dstee.empty_units(mask)) == 3
    tx = dstee.transform(masks={"kernel": mask}, total_steps=200, key=KEY)
    assert "3/5" in dstee.summary(tx.init({"kernel": jnp.ones(mask.shape)}))
