"""Whole output units: exchanged by the sums of their scores, whole at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import structures

KEY = jax.random.key(0)


def run(params, steps=8, **options):
    tx = dstee.methods.rigl(
        optax.sgd(0.0), total_steps=20, every=4, stop=1.0, key=KEY, update_weights=True, **options
    )
    state = tx.init(params)
    history = [state.masks]
    params = dstee.apply_masks(params, state)
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), params)
    step = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    for _ in range(steps):
        params, state = step(grads, state, params)
        history.append(state.masks)
    return params, grads, history


@pytest.mark.parametrize("output_axis", [-1, 0])
def test_a_round_exchanges_the_units_of_lowest_and_highest_sums(output_axis):
    units = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool)
    w = np.random.default_rng(0).normal(size=(6, 8))
    mask = np.broadcast_to(units, (6, 8)).copy()
    if output_axis == 0:
        w, mask = w.T, mask.T
    _, grads, history = run(
        {"kernel": jnp.asarray(w, jnp.float32)},
        masks={"kernel": mask},
        structure=structures.channels(output_axis=output_axis),
        drop_fraction=optax.constant_schedule(0.4),
        steps=4,
    )
    inputs = 1 if output_axis == 0 else 0
    drop = np.where(units, abs(w).sum(inputs), np.inf)
    grow = abs(np.asarray(grads["kernel"])).sum(inputs)
    expected = units.copy()
    expected[np.argsort(drop)[:2]] = False
    expected[sorted(np.flatnonzero(~expected), key=lambda i: -grow[i])[:2]] = True
    new = np.asarray(history[-1]["kernel"])
    np.testing.assert_array_equal(new.any(inputs), expected)
    np.testing.assert_array_equal(new.all(inputs), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_units_are_whole_in_convolutions_and_stacked_layers(packed):
    params = {
        "conv": {"kernel": jax.random.normal(KEY, (3, 3, 4, 16)), "bias": jnp.ones(16)},
        "blocks": {"kernel": jax.random.normal(KEY, (3, 8, 12))},
    }
    params, _, history = run(
        params,
        sparsity=0.5,
        distribution=dstee.uniform,
        structure=structures.channels(),
        stack_axes=lambda path, leaf: (0,) if "blocks" in str(path) else (),
        packed=packed,
    )
    for masks in history:
        conv, blocks = (np.asarray(masks[x]["kernel"]) for x in ("conv", "blocks"))
        assert (conv.any((0, 1, 2)) == conv.all((0, 1, 2))).all()
        assert conv.all((0, 1, 2)).sum() == 8
        assert (blocks.any(1) == blocks.all(1)).all()
        assert blocks.all(1).sum(1).tolist() == [6, 6, 6]
    assert (np.asarray(history[0]["conv"]["kernel"]) != conv).any()
    assert not np.asarray(params["conv"]["kernel"])[~conv].any()


def test_one_unit_stays_where_few_are():
    _, _, history = run(
        {"kernel": jnp.ones((5, 4))},
        sparsity=0.9,
        structure=structures.channels(),
        drop_fraction=optax.constant_schedule(1.0),
    )
    assert [int(m["kernel"].all(0).sum()) for m in history] == [1] * 9


def test_bad_input():
    given = {"kernel": np.arange(20).reshape(5, 4) < 3}
    with pytest.raises(ValueError, match="does not have the structure"):
        run({"kernel": jnp.ones((5, 4))}, masks=given, structure=structures.channels())
    with pytest.raises(ValueError, match="output_axis=2 is no axis of shape"):
        run(
            {"kernel": jnp.ones((5, 4))},
            sparsity=0.5,
            structure=structures.channels(output_axis=2),
        )
