"""SRigL's rounds against the rule in NumPy: ablation, shared weights, units that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import methods, structures

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)
STEPS = 40


def a_round(w, g, mask, k, total, gamma, of_dense, exempt):
    """One layer, (inputs, units), by the words of SRigL's code, weight by weight."""
    fan_in, n = w.shape
    keep = mask.sum() - k
    by_size = sorted(zip(*np.nonzero(mask), strict=True), key=lambda at: (-abs(w[at]), at))
    by_grad = sorted(np.ndindex(w.shape), key=lambda at: (-abs(g[at]), at))
    salient = set(map(tuple, by_size[:keep])) | set(by_grad[:k])
    counts = [sum(at[1] == unit for at in salient) for unit in range(n)]
    threshold = max(1, int(gamma * (fan_in if of_dense else total // n)) if gamma < 1 else gamma)
    least = max(total // fan_in, 1)
    threshold = min(threshold, sorted(counts, reverse=True)[least - 1])
    live = [exempt or count >= threshold for count in counts]
    each = min(total // sum(live), fan_in)
    stays = [tuple(at) for at in by_size if live[at[1]]][:keep]
    new = np.zeros_like(mask)
    for unit in np.flatnonzero(live):
        mine = [at for at in stays if at[1] == unit][:each]
        free = [at for at in by_grad if at[1] == unit and at not in mine]
        for at in mine + free[: each - len(mine)]:
            new[at] = True
    return new


def gradients(step, sizes):
    """Large for some units, small for others, not always for the same."""
    rng = np.random.default_rng(step)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=s) * rng.exponential(size=s[1]) ** 4, "float32")
        }
        for name, s in sizes.items()
    }


@pytest.mark.parametrize(
    ("gamma", "of_dense"), [(0.3, False), (0.95, False), (0.3, True), (3, False)]
)
def test_rounds(gamma, of_dense):
    sizes = {"a": (12, 20), "b": (20, 8), "head": (8, 6)}
    tx = methods.srigl(
        optax.sgd(0.05),
        sparsity=0.7,
        distribution=dstee.uniform,
        total_steps=STEPS,
        every=5,
        stop=1.0,
        gamma=gamma,
        of_dense=of_dense,
        exempt=lambda name, shape: name.startswith("head"),
        key=KEY,
    )
    keys = jax.random.split(jax.random.key(7), 3)
    draws = zip(sizes.items(), keys, strict=True)
    params = {
        name: {"kernel": jax.random.normal(key, size) * jnp.exp(jax.random.normal(key, size[1:]))}
        for (name, size), key in draws
    }
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    totals = {name: int(m["kernel"].sum()) for name, m in state.masks.items()}
    step = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    counts = []
    for t in range(1, STEPS + 1):
        grads = gradients(t, sizes)
        after, new = step(grads, state, params)
        for name, total in totals.items():
            w, g, mask, now, w_now = (
                np.asarray(tree[name]["kernel"])
                for tree in (params, grads, state.masks, new.masks, after)
            )
            fraction = 0.15 * (1 + np.cos(np.float32(np.pi * t / STEPS)))
            if t % 5 or t == STEPS:
                np.testing.assert_array_equal(now, mask)
            else:
                k = min(max(int(fraction * total), 1), mask.sum())
                expected = a_round(w, g, mask, k, total, gamma, of_dense, name == "head")
                np.testing.assert_array_equal(now, expected)
                np.testing.assert_array_equal(w_now, w * (mask & now))  # grown ones at zero
            assert not w_now[~now].any()
            fans = now.sum(0)
            assert len(set(fans[fans > 0])) == 1
            live = (fans > 0).sum()
            assert now.sum() == min(total // live, len(now)) * live
            counts.append((name, tuple(fans > 0)))
        params, state = after, new
    live = {name: [units for which, units in counts if which == name] for name in sizes}
    assert all(all(units) for units in live["head"])
    assert any(not all(units) for units in live["a"] + live["b"])
    revived = [
        np.any(np.array(b) & ~np.array(a)) for a, b in zip(live["a"], live["a"][1:], strict=False)
    ]
    assert any(revived) or gamma == 0.3


@pytest.mark.optimized(False)
@pytest.mark.parametrize("axis", [-1, 0])
def test_convolutions_stacked_layers_and_outputs_first(axis):
    if axis == 0:
        params = {"conv": {"kernel": jax.random.normal(KEY, (16, 4, 3, 3))}}
    else:
        params = {"blocks": {"kernel": jax.random.normal(KEY, (3, 3, 4, 12))}}
    tx = methods.srigl(
        optax.adam(0.1),
        sparsity=0.7,
        total_steps=20,
        every=4,
        stop=1.0,
        gamma=0.9,
        output_axis=axis,
        stack_axes=lambda path, leaf: () if axis == 0 else (0,),
        key=KEY,
    )
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    step = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    for t in range(12):
        grads = jax.tree.map(lambda x, t=t: jax.random.normal(jax.random.key(t), x.shape), params)
        params, state = step(grads, state, params)
        dstee.check(tx, state, params)
    ((kernel,), (mask,)) = (jax.tree.leaves(x) for x in (params, state.masks))
    for layer in mask if axis else [mask]:
        fans = np.moveaxis(np.asarray(layer), axis, -1).reshape(-1, layer.shape[axis]).sum(0)
        assert len(set(fans[fans > 0])) == 1
        assert not fans.all()
    np.testing.assert_array_equal(kernel, kernel * mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_grow_last(bad):
    given = {"kernel": np.arange(24).reshape(6, 4) < 8}
    tx = methods.srigl(
        optax.sgd(0.0), masks=given, total_steps=20, every=2, key=KEY, where=lambda *_: True
    )
    params = {"kernel": jnp.ones((6, 4))}
    state = tx.init(params)
    some = jnp.arange(24.0).reshape(6, 4).at[3].set(bad)
    for grads, same in ((jnp.full((6, 4), bad), True), (some, False)):
        new = state
        for _ in range(2):
            _, new = tx.update({"kernel": grads}, new, params)
        assert (np.asarray(new.masks["kernel"]) == given["kernel"]).all() == same
        assert not new.masks["kernel"][3].any()
        assert set(np.asarray(new.masks["kernel"]).sum(0)) == {2}


def test_a_state_goes_on():
    params = {"kernel": jax.random.normal(KEY, (12, 10))}
    make = lambda **o: methods.srigl(optax.sgd(0.1), total_steps=20, key=KEY, **o)  # noqa: E731
    tx = make(sparsity=0.7, every=2)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    grads = {"kernel": params["kernel"].at[:, 5:].set(0.0)}
    for _ in range(6):
        params, state = dstee.apply(tx, grads, state, params)
    again = dstee.carry_over(state, make(sparsity=0.7, every=3), params)
    np.testing.assert_array_equal(again.masks["kernel"], state.masks["kernel"])
    given = make(masks=state.masks, every=2).init(params)
    np.testing.assert_array_equal(given.masks["kernel"], state.masks["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma=-1.0 must be 0 or more"),
        ({"packed": True}, "a structure without ablation, so that counts stay"),
        ({"indices": True}, "a structure without ablation, so that counts stay"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        methods.srigl(optax.sgd(0.1), sparsity=0.5, total_steps=20, key=KEY, every=2, **options)


def test_a_mask_that_does_not_fit():
    given = {"kernel": np.arange(20).reshape(5, 4) < 5}
    with pytest.raises(ValueError, match="does not have the structure"):
        dstee.transform(
            optax.sgd(0.1),
            masks=given,
            structure=structures.ablation(),
            total_steps=20,
            every=2,
            key=KEY,
        ).init({"kernel": jnp.ones((5, 4))})
