"""States of other sparsities: found by `check`, and gone on from by `carry_over`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import methods, structures

KEY = jax.random.key(0)


def tree(seed):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "a": {"kernel": jax.random.normal(k1, (12, 20)), "bias": jnp.ones(20)},
        "b": {"kernel": jax.random.normal(k2, (20, 5))},
    }


def make(sparsity, inner=None, **options):
    inner = optax.adam(optax.cosine_decay_schedule(0.1, 100)) if inner is None else inner
    return methods.rigl(inner, sparsity=sparsity, total_steps=100, key=KEY, every=5, **options)


def train(tx, params, steps, opt_state=None):
    if opt_state is None:
        opt_state = tx.init(params)
        if dstee.get_states(opt_state):
            params = dstee.apply_masks(params, opt_state)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(params, opt_state, tree(10 + i))
    return params, opt_state


def moments(opt_state):
    inner = opt_state.inner_state if dstee.get_states(opt_state) else opt_state
    return inner[0]


def kernels_of(params):
    return {name: params[name]["kernel"] for name in params}


def test_a_state_of_another_sparsity_never_leaves_weights_behind_its_mask():
    """Whatever sparsity the optimizer has, 0 too: outside the state's mask weights are zero."""
    state = make(0.75).init(tree(0))
    for sparsity in (0.5, 0.0):
        for packed in (False, True):
            tx = make(sparsity, packed=packed)
            given = make(0.75, packed=packed).init(tree(0))
            params, update = dstee.apply_masks(tree(0), given), jax.jit(tx.update)
            for _ in range(7):
                if packed and sparsity == 0:
                    break  # other arrays: `check` says so, and the update fails by shapes
                updates, given = update(tree(1), given, params)
                params = optax.apply_updates(params, updates)
                for name, mask in kernels_of(given.masks).items():
                    assert not params[name]["kernel"][~mask].any()
                    assert mask.sum() == state.masks[name]["kernel"].sum()


@pytest.mark.parametrize("packed", [False, True])
def test_check(packed):
    tx, params = make(0.75, packed=packed), tree(0)
    state = tx.init(params)
    dstee.check(tx, state, params)
    params, state = train(tx, params, 12)
    dstee.check(tx, state, params)
    chain = optax.chain(optax.clip_by_global_norm(1.0), tx)
    dstee.check(chain, chain.init(params), params)
    dstee.check(optax.adam(0.1), optax.adam(0.1).init(params), params)
    with pytest.raises(
        ValueError, match=r"a/kernel has \d+ active weights" if not packed else "shape"
    ):
        dstee.check(make(0.5, packed=packed), state, params)
    with pytest.raises(ValueError, match="active weights" if not packed else "shape"):
        dstee.check(make(0.75, packed=packed, distribution=dstee.uniform), state, params)
    with pytest.raises(ValueError, match="alone has"):
        dstee.check(make(0.75, optax.sgd(0.1), packed=packed), state, params)
    with pytest.raises(ValueError, match="alone has"):
        dstee.check(optax.adam(0.1), state, params)
    smaller = tree(0) | {"b": {"kernel": jnp.ones((20, 6))}}
    with pytest.raises(ValueError, match="has shape"):
        dstee.check(tx, state, smaller)


def test_check_looks_at_parts_and_passes_over_plans():
    params = {"blocks": {"kernel": tree(0)["a"]["kernel"].reshape(3, 4, 20)}}
    stacked = functools.partial(make, stack_axes=lambda path, leaf: (0,))
    state = stacked(0.5).init(params)
    dstee.check(stacked(0.5), state, params)
    mask = np.zeros((3, 4, 20), bool)
    mask[0], mask[1, :2] = True, True
    moved = state._replace(masks={"blocks": {"kernel": jnp.asarray(mask)}})
    assert mask.sum() == state.masks["blocks"]["kernel"].sum()
    with pytest.raises(ValueError, match=r"has \[80 40  0\] active weights in opt_state"):
        dstee.check(stacked(0.5), moved, params)
    gradual = methods.gmp(optax.sgd(0.1), sparsity=0.8, total_steps=50, key=KEY, every=5)
    params, state = train(gradual, tree(0), 20)
    dstee.check(gradual, state, params)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0.5, 0.8), (0.8, 0.5), (None, 0.8), (0.8, None)])
def test_survivors_keep_everything(before, after, packed):
    first = optax.adam(optax.cosine_decay_schedule(0.1, 100))
    old = first if before is None else make(before, packed=packed)
    new = first if after is None else make(after, packed=not packed)
    params, state = train(old, tree(0), 12)
    carried = dstee.carry_over(state, new, params)
    dstee.check(new, carried, params)
    small = dstee.apply_masks(params, carried) if after is not None else params
    # Seen without packing: the same carried once more, to a plain state.
    plain = carried if after is None else dstee.carry_over(carried, make(after), small)
    seen = state if before is None else dstee.carry_over(state, make(before), params)
    assert int(moments(plain).count) == 12
    for name, weight in kernels_of(params).items():
        now = np.ones(weight.shape, bool) if after is None else plain.masks[name]["kernel"]
        was = np.ones(weight.shape, bool) if before is None else seen.masks[name]["kernel"]
        stays, size = np.asarray(now & was), abs(np.asarray(weight))
        if after is not None and (before is None or after > before):
            assert (now <= was).all()
            gone = np.asarray(was & ~now)
            assert size[np.asarray(now)].min() >= size[gone].max()
        else:
            assert (was <= now).all()
        for field in ("mu", "nu"):
            moment = getattr(moments(plain), field)[name]["kernel"]
            was_moment = getattr(moments(seen), field)[name]["kernel"]
            np.testing.assert_array_equal(moment[stays], was_moment[stays])
            assert not moment[np.asarray(now) & ~np.asarray(was)].any()
    # The dense leaf's moments are as they were, and training goes on at the schedule's place.
    np.testing.assert_array_equal(moments(plain).mu["a"]["bias"], moments(seen).mu["a"]["bias"])
    if after is not None:
        assert int(plain.count) == (12 if before is not None else 0)
        small, carried = train(new, small, 8, carried)
        assert all(not small[n]["kernel"][~m].any() for n, m in kernels_of(carried.masks).items())


def test_what_cannot_be_carried_over():
    params = tree(0)
    state = make(0.5).init(params)
    with pytest.raises(ValueError, match="alone has"):
        dstee.carry_over(state, make(0.8, optax.sgd(0.1)), params)
    halves = functools.partial(
        make, structure=structures.constant_fan_in(), distribution=dstee.uniform
    )
    state = halves(0.5).init(params)
    with pytest.raises(ValueError, match="are not adapted"):
        dstee.carry_over(state, halves(0.75), params)
    two = optax.chain(make(0.5), make(0.5))
    with pytest.raises(ValueError, match="2 SparseStates and tx 1"):
        dstee.carry_over(two.init(params), make(0.8), params)
