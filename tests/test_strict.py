"""Every method and option under JAX's strict settings, with scalars among the parameters."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from dstee_jax import at_init, memory, methods, plans, scales, scores, soft_threshold, structures


@contextlib.contextmanager
def no_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def x64():
    with jax.enable_x64(True), no_promotion():
        yield


STRICT = {"x64": x64, "no promotion": no_promotion}


def sgd(rate=0.1, decay=0.9):
    """Momentum SGD that is strict itself: optax's own optimizers are not all."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.result_type(p)), params)

    def update(grads, state, params=None):
        state = jax.tree.map(lambda g, m: g + jnp.asarray(decay, m.dtype) * m, grads, state)
        return jax.tree.map(lambda m: jnp.asarray(-rate, m.dtype) * m, state), state

    return optax.GradientTransformation(init, update)


def params_of(kind):
    """A kernel, stacked kernels, a bias, and scalars: a Python float and an array of no axis."""
    rng = np.random.default_rng(0)
    dtype = {"x64": np.float64}.get(kind, np.float32)
    shapes = {"a": {"kernel": (8, 16)}, "b": {"kernel": (3, 8, 8)}, "bias": (16,)}
    draws = {
        "a": {"kernel": rng.normal(size=shapes["a"]["kernel"])},
        "b": {"kernel": rng.normal(size=shapes["b"]["kernel"])},
        "bias": rng.normal(size=shapes["bias"]),
    }
    arrays = jax.tree.map(lambda x: jnp.asarray(x.astype(dtype)), draws)
    return arrays | {"gain": 0.5, "scale": jnp.asarray(1.5, dtype)}


def stacked(path, leaf):
    return (0,) if path[0].key == "b" else ()


def halves(path, leaf):
    return (2,) * leaf.ndim if path[0].key == "a" else (1,) * leaf.ndim


def whole_masks(kind):
    masks = dstee.init_masks(params_of(kind), 0.5, jax.random.key(1))
    return jax.tree.map(np.asarray, masks)


UNIFORM = {"distribution": dstee.uniform, "sparsity": 0.5}
TWO_AXES = {"where": lambda path, leaf: jnp.ndim(leaf) == 2}
OWN = {"cht": TWO_AXES, "chts": TWO_AXES, "smet": {"betas": None}}
METHODS = {name: (getattr(methods, name), OWN.get(name, {})) for name in methods.__all__}
OPTIONS = {
    "packed": {"packed": True},
    "indices": {"indices": True},
    "packed, stacked": {"packed": True, "stack_axes": stacked, "distribution": dstee.uniform},
    "packed, blocks": {"packed": True, "blocks": halves, "distribution": dstee.uniform},
    "n:m": {"structure": structures.n_m(2, 4), **UNIFORM},
    "tiles": {"structure": structures.tiles((2, 2))},
    "tiles, packed": {"structure": structures.tiles((4, 2)), "packed": True},
    "tiles, stacked": {"structure": structures.tiles((2, 2)), "stack_axes": stacked},
    "fan-in": {"structure": structures.constant_fan_in()},
    "fan-in, stacked": {"structure": structures.constant_fan_in(), "stack_axes": stacked},
    "fan-in of outputs": {"structure": structures.constant_fan_in(output_axis=0)},
    "channels": {"structure": structures.channels()},
    "channels, stacked": {"structure": structures.channels(), "stack_axes": stacked},
    "stack_axes": {"stack_axes": stacked},
    "blocks": {"blocks": halves},
    "grow_batches": {"grow_batches": 2},
    "memory": {"memory": memory.dense_momentum(), "grow": scores.momentum()},
    "signs": {"memory": memory.signs(), "drop": scores.along_sign()},
    "penalty": {"penalty": lambda leaf: jnp.asarray(0.01, leaf.param.dtype) * leaf.param},
    "warm start": {"scale": scales.product(scales.warm_up(5), scales.own_bias_correction())},
    "warm start, stacked": {"scale": scales.warm_up(5), "stack_axes": stacked},
    "warm start, tiles": {"scale": scales.density(), "structure": structures.tiles((2, 2))},
    "masks": {"masks": whole_masks, "sparsity": None},
    "by name": {"sparsity": {"a/kernel": 0.5, "b/kernel": 0.75}},
    "top_k": {"selection": "top_k"},
    "bisection": {"selection": "bisection"},
    "sharded": {"selection": "sharded"},
    "uint8": {"counter_dtype": jnp.uint8, "counter_init": "zeros", "counter_update": "old"},
    "uint32": {"counter_dtype": jnp.uint32},
    "acquisition": {"grow": scores.acquisition(normalize=True, signed=True)},
    "random": {"grow": scores.random(), "regrow": True},
    "saliency": {"drop": scores.normalized(scores.saliency())},
    "two sides": {"drop": scores.two_sided(0.3), "drop_fraction": optax.constant_schedule(0.3)},
    "sampled": {"drop": scores.sampled(scores.magnitude(), 2.0)},
    "update_weights": {"update_weights": True},
    "callable every": {"every": lambda step: 3},
    "schedule": {"drop_fraction": optax.constant_schedule(0.3)},
    "of all": {"plan": plans.exchange(of_all=True), "drop_fraction": 0.1},
    "overall": {"plan": plans.exchange(overall=True)},
    "subset": {"grow": scores.subset(scores.gradient())},
    "below zero": {"plan": plans.below_zero(), "drop": scores.magnitude()},
    "redistribute": {"plan": plans.redistribute(scores.magnitude())},
    "threshold": {"plan": plans.adaptive_threshold()},
    "gradual": {"plan": plans.gradual(0.2, end=0.5)},
    "gradual, overall": {"plan": plans.gradual(0.2, end=0.5, overall=True)},
    "rotation": {"plan": plans.rotation(2)},
    "last link": {"inner": None},
    "Nesterov's": {"inner": "sgd"},
}
SETTINGS = METHODS | {name: (dstee.transform, options) for name, options in OPTIONS.items()}


def make(factory, options, kind):
    few = {"sparsity": 0.75, "total_steps": 12, "key": jax.random.key(0), "every": 3, "stop": 1.0}
    if factory is methods.deep_r:
        few["every"] = 1
    if factory is methods.static:
        few["every"] = None
    settings = few | options
    if callable(settings.get("masks")):
        settings["masks"] = settings["masks"](kind)
    inner = settings.pop("inner", sgd())
    return factory(optax.sgd(0.1) if inner == "sgd" else inner, **settings)


RUN = ("dst_ee", "snfs", "packed", "tiles", "threshold")


@pytest.mark.parametrize("name", SETTINGS)
def test_steps(name):
    with x64():
        params = params_of(kind := "x64")
        tx = make(*SETTINGS[name], kind)
        state = tx.init(params)
        types = jax.tree.map(jnp.result_type, state)
        params = dstee.apply_masks(params, state)
        extra = ["grad"] if dstee.get_state(state).inner_state == () else []

        @jax.jit
        def by_update(params, state):
            updates, state = tx.update(params, state, params, **dict.fromkeys(extra, params))
            return optax.apply_updates(params, updates), state

        @jax.jit
        def by_apply(params, state):
            return dstee.apply(tx, params, state, params, **dict.fromkeys(extra, params))

        # What promotes wrongly does so when it is traced; compiling all of them takes minutes.
        for step in (by_update, by_apply):
            new, after = jax.eval_shape(step, params, state)
            assert jax.tree.map(jnp.result_type, after) == types
            assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
        if name in RUN:
            new, after = params, state
            for _ in range(3):
                new, after = by_update(new, after)
            assert int(dstee.get_state(after).count) == 3
            jax.tree.map(np.testing.assert_array_equal, dstee.apply_masks(new, after), new)


@pytest.mark.parametrize("kind", STRICT)
@pytest.mark.parametrize("name", ["tiles, packed", "tiles, packed, stacked"])
def test_candidates(name, kind):
    with STRICT[kind]():
        shapes = jax.eval_shape(lambda: params_of(kind))
        options = {"structure": structures.tiles((4, 2)), "packed": True}
        options |= {"stack_axes": stacked} if "stacked" in name else {}
        tx = make(dstee.transform, options, kind)
        state = jax.eval_shape(tx.init, shapes)

        def step(state, params):
            now = dstee.tiles(state, shapes)
            tiles = dstee.tiles(state, shapes, candidates=0.5)
            params = dstee.to_tiles(dstee.to_tiles(params, now), tiles, of=now)
            updates, _ = tx.update(params, state, params, tiles=tiles)
            params = optax.apply_updates(params, updates)
            params, state = dstee.apply(tx, params, state, params, tiles=tiles)
            return dstee.to_tiles(params, dstee.tiles(state, shapes), of=tiles), state, now

        new, after, now = jax.eval_shape(step, state, shapes)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        expected = jax.eval_shape(dstee.to_tiles, shapes, now)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )


@pytest.mark.parametrize("kind", STRICT)
def test_what_is_around_a_step(kind):
    with STRICT[kind]():
        params = params_of(kind)
        tx = make(dstee.transform, {}, kind)
        state = tx.init(params)
        scaled = dstee.rescale(params, state)
        assert jax.tree.map(jnp.shape, scaled) == jax.tree.map(jnp.shape, params)
        assert 0 < float(dstee.density(state)) <= float(dstee.exploration_degree(state)) < 1
        assert "a/kernel" in dstee.summary(state, params)
        jax.tree.map(dstee.empty_units, state.masks)

        def loss(p):
            return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))

        assert np.isfinite(dstee.exploitation_degree(loss, params, params))
        soft = soft_threshold.init(params)
        jax.grad(lambda p: loss(soft_threshold.apply(p)))(soft)
        assert 0 < float(soft_threshold.density(soft)) <= 1


@pytest.mark.parametrize("kind", STRICT)
def test_masks_before_training(kind):
    with STRICT[kind]():
        params = params_of(kind)

        def loss(p, batch):
            hidden = jnp.tanh(batch @ p["a"]["kernel"].astype(jnp.float32))
            return jnp.mean(jnp.square(hidden)) + jnp.sum(jnp.square(p["b"]["kernel"])).astype(
                jnp.float32
            )

        batch = jnp.ones((4, 8), jnp.float32)
        for how in (at_init.random, at_init.magnitude, at_init.snip, at_init.grasp):
            masks = how(loss, params, batch, 0.5, jax.random.key(0))
            assert 0 < sum(int(m.sum()) for m in jax.tree.leaves(masks))


@pytest.mark.parametrize("kind", STRICT)
def test_pmean(kind):
    with STRICT[kind]():
        params = params_of(kind)
        tx = make(dstee.transform, {"indices": True}, kind)
        state = tx.init(params)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

        def step(params, state):
            return dstee.pmean(params, state, "x")

        averaged = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        found = jax.jit(averaged)(params, state)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
