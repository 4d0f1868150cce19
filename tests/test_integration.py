"""Frameworks, JAX transformations, devices, checkpoints: real parts, small."""

import functools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from dstee_jax import scores

KEY = jax.random.key(0)
PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (16, 24)), "bias": jnp.ones(24)}
X = jax.random.normal(jax.random.key(2), (8, 16))


def make(inner=None, key=KEY, **options):
    inner = optax.adam(0.01) if inner is None else inner
    settings = {"sparsity": 0.8, "total_steps": 12, "every": 3} | options
    return dstee.transform(inner, key=key, **settings)


def loss(params, x=X):
    return jnp.mean((x @ params["kernel"] + params["bias"]) ** 2)


def train(tx, params, state, steps, compilations=1):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() <= compilations
    return params, state


def start(tx):
    state = tx.init(PARAMS)
    return jax.tree.map(jnp.copy, dstee.apply_masks(PARAMS, state)), state


def equal(a, b):
    key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = lambda x: jax.random.key_data(x) if key(x) else x  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_nnx():
    model = nnx.Sequential(
        nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Linear(24, 2, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    nnx.update(model, dstee.apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(7):
        step(model, optimizer)
    state = dstee.get_state(optimizer.opt_state)
    np.testing.assert_allclose(dstee.density(optimizer.opt_state), 0.2, atol=0.01)
    assert float(dstee.exploration_degree(optimizer.opt_state)) > 0.2
    params = nnx.state(model, nnx.Param)
    assert dstee.summary(optimizer.opt_state, params).splitlines()[-1].startswith("network ")
    kernel = model.layers[0].kernel[...]
    mask = state.masks["layers"][0]["kernel"]
    assert not jnp.any(jnp.where(mask, 0, kernel))
    assert int((kernel != 0).sum()) >= int(mask.sum()) - 30  # some have just grown


def test_linen():
    model = linen.Dense(24)
    variables = model.init(KEY, X)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=make())
    state = state.replace(params=dstee.apply_masks(state.params, state.opt_state))

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, X) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(5):
        state = step(state)
    mask = dstee.get_state(state.opt_state).masks["kernel"]
    assert not jnp.any(jnp.where(mask, 0, state.params["kernel"]))


def test_equinox():
    model = eqx.nn.MLP(16, 2, 24, 1, key=KEY)
    tx = make()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)

    @eqx.filter_jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(jax.vmap(eqx.combine(p, static))(X) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert not jnp.any(jnp.where(state.masks.layers[0].weight, 0, params.layers[0].weight))


def test_eager_and_scan_agree_with_jit():
    tx = make()
    jitted = train(tx, *start(tx), 7)
    eager_params, eager_state = start(tx)
    for _ in range(7):
        updates, eager_state = tx.update(jax.grad(loss)(eager_params), eager_state, eager_params)
        eager_params = optax.apply_updates(eager_params, updates)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(step, start(tx), None, length=7)
    for params, state in ((eager_params, eager_state), scanned):
        close(params, jitted[0])
        equal(state.masks, jitted[1].masks)


def test_vmap_over_seeds_keeps_the_branch():
    keys = jax.random.split(KEY, 3)
    axes = dstee.seed_axes(jax.eval_shape(make().init, PARAMS))
    states = jax.vmap(lambda key: make(key=key).init(PARAMS), out_axes=axes)(keys)
    params = jax.vmap(dstee.apply_masks, in_axes=(None, axes))(PARAMS, states)

    def step(params, state):
        updates, state = make().update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    many = jax.jit(jax.vmap(step, in_axes=(0, axes), out_axes=(0, axes)))
    assert "cond" in str(jax.make_jaxpr(many)(params, states))
    for _ in range(7):
        params, states = many(params, states)
    for i, key in enumerate(keys):
        tx = make(key=key)
        alone, state = train(tx, *start(tx), 7)
        close(jax.tree.map(lambda x, i=i: x[i], params), alone)
        equal(jax.tree.map(lambda x, i=i: x[i], states.masks), state.masks)


def test_donation_does_not_eat_the_key():
    tx = make()
    params, state = start(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    jax.random.uniform(KEY)
    tx.init(PARAMS)


def test_eval_shape_and_map_params():
    tx = make()
    shapes = jax.eval_shape(tx.init, jax.eval_shape(lambda: PARAMS))
    state = tx.init(PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    doubled = optax.tree.map_params(
        make(optax.sgd(0.1, momentum=0.9)),
        lambda x: x if isinstance(x, optax.MaskedNode) else x * 2,
        make(optax.sgd(0.1, momentum=0.9)).init(PARAMS),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert jax.tree.structure(doubled.masks) == jax.tree.structure(state.masks)


def test_multi_transform():
    tx = optax.multi_transform(
        {"sparse": make(), "plain": optax.sgd(0.1)}, {"kernel": "sparse", "bias": "plain"}
    )
    params, state = train(tx, *start(tx), 7)
    mask = dstee.get_state(state).masks["kernel"]
    assert not jnp.any(jnp.where(mask, 0, params["kernel"]))
    assert jnp.any(params["bias"] != 1)


def test_labels_above_the_leaves():
    params = {"a": PARAMS, "b": PARAMS}
    for tx in (
        optax.multi_transform({"s": make(), "p": optax.sgd(0.1)}, {"a": "s", "b": "p"}),
        optax.masked(make(), {"a": True, "b": False}),
    ):
        sparse = dstee.apply_masks(params, tx.init(params))
        assert jnp.sum(sparse["a"]["kernel"] != 0) == 77
        assert jnp.all(sparse["b"]["kernel"] == PARAMS["kernel"])


def test_where_sees_the_same_paths_in_nnx():
    model, seen = nnx.Linear(16, 24, rngs=nnx.Rngs(0)), set()

    def where(path, leaf):
        seen.add(jax.tree_util.keystr(path))
        return path[-1].key == "kernel"

    optimizer = nnx.Optimizer(model, make(where=where), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model))
    assert seen == {"['kernel']", "['bias']"}


def test_seeds_inside_multisteps():
    def init(key):
        return optax.MultiSteps(make(key=key), 2).init(PARAMS)

    keys = jax.random.split(KEY, 3)
    axes = dstee.seed_axes(jax.eval_shape(init, keys[0]))
    states = jax.vmap(init, out_axes=axes)(keys)
    assert states.mini_step.shape == ()
    assert dstee.get_state(states).count.shape == ()
    assert dstee.get_state(states).masks["kernel"].shape == (3, 16, 24)


@pytest.mark.parametrize("selection", ["top_k", "bisection"])
def test_shard_map_with_a_seed_on_each_device(selection):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(KEY, 8)
    masks = jax.vmap(lambda k: jax.random.bernoulli(k, 0.3, (16, 24)))(keys)
    scores_ = jax.vmap(lambda k: jax.random.normal(k, (16, 24)))(keys)

    def one(mask, score):
        new = dstee.drop_and_grow(
            mask[0], jnp.abs(score[0]), score[0], 9, k_max=20, selection=selection
        )
        return new[None]

    spread = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    for i, new in enumerate(spread(masks, scores_)):
        np.testing.assert_array_equal(new, one(masks[i : i + 1], scores_[i : i + 1])[0])


@pytest.mark.parametrize("selection", ["top_k", "bisection"])
@pytest.mark.parametrize("grow", [scores.acquisition(normalize=True), scores.random()])
def test_strict_dtype_promotion(selection, grow):
    with jax.numpy_dtype_promotion("strict"):
        tx = make(optax.sgd(0.1, momentum=0.9), selection=selection, grow=grow)
        train(tx, *start(tx), 4)


@pytest.mark.parametrize("spec", [P(), P(None, "x"), P("x", None)])
def test_eight_devices_agree_with_one(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = make(optax.sgd(0.1, momentum=0.9), selection="bisection")
    one, one_state = train(tx, *start(tx), 7)
    place = {"kernel": NamedSharding(mesh, spec), "bias": NamedSharding(mesh, P())}
    params = jax.device_put(PARAMS, place)
    state = jax.jit(tx.init)(params)
    params, state = train(tx, dstee.apply_masks(params, state), state, 7, 3)
    close(params, one)
    equal(jax.device_get(state.masks), jax.device_get(one_state.masks))


def test_pmap():
    tx = make(optax.sgd(0.1, momentum=0.9))
    one, one_state = train(tx, *start(tx), 7)
    params, state = start(tx)
    copies = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)  # noqa: E731
    params, state = copies(params), copies(state)

    @functools.partial(jax.pmap, axis_name="x")
    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), "x")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(7):
        params, state = step(params, state, X[:, None])
    close(jax.tree.map(lambda x: x[3], params), one)
    equal(jax.tree.map(lambda x: x[3], state.masks), one_state.masks)


def test_checkpoint_round_trip(tmp_path):
    tx = make()
    params, state = train(tx, *start(tx), 4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: {"params": PARAMS, "state": tx.init(PARAMS)})
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes
        )
        restored = checkpointer.restore(tmp_path / "step", target)
    equal(restored, {"params": params, "state": state})
    equal(train(tx, restored["params"], restored["state"], 4), train(tx, params, state, 4))


def test_metrics():
    params = {"kernel": jnp.zeros((4, 5)), "tiny": {"kernel": jnp.zeros((2, 2))}}
    tx = make(sparsity={"kernel": 0.5, "tiny/kernel": 0.0})
    state = tx.init(params)
    np.testing.assert_allclose(dstee.density(state), (10 + 4) / 24)
    np.testing.assert_allclose(dstee.exploration_degree(state), (10 + 4) / 24)
    assert "14" in dstee.summary(state).splitlines()[-1]
    w, grown = {"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}
    degree = dstee.exploitation_degree(lambda p: jnp.sum((p["w"] - 1) ** 2), w, grown)
    assert float(degree) == (4 + 1) - (4 + 1)


def test_summary_ends_with_what_stays_dense():
    params = {
        "embed": {"embedding": jnp.ones((50, 16))},
        "head": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)},
        "scale": jnp.ones(()),
    }
    state = optax.chain(make(sparsity=0.5)).init(params)
    *_, total, names = dstee.summary(state).splitlines()
    assert total.split()[:2] == ["total", "512"]
    assert names == "dense: embed/embedding, head/bias, scale"
    *_, table, rest, network = dstee.summary(state, params).splitlines()
    assert table.split()[:5] == ["dense:", "embed/embedding", "50×16", "800", "800"]
    assert rest.split()[:6] == ["dense:", "2", "vectors", "and", "scalars", "33"]
    assert network.split() == ["network", "1,345", "1,089", "(", "81.0%)"]  # 256 + 800 + 33
    shapes = jax.eval_shape(lambda: params)
    assert dstee.summary(state, shapes) == dstee.summary(state, params)
    with pytest.raises(ValueError, match="masks have nothing for other"):
        dstee.summary(state, params | {"other": jnp.ones(3)})


def test_rescale_restores_the_variance():
    params = {"kernel": jax.random.normal(KEY, (400, 300)) / 20, "bias": jnp.zeros(300)}
    masks = dstee.init_masks(params, 0.9, KEY)
    x = jax.random.normal(KEY, (200, 400))
    for per_unit in (False, True):
        scaled = dstee.rescale(params, masks, per_unit=per_unit)
        np.testing.assert_allclose(jnp.var(x @ scaled["kernel"]), 1.0, atol=0.1)
        assert not jnp.any(jnp.where(masks["kernel"], 0, scaled["kernel"]))
