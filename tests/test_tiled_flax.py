"""Layers of Flax NNX and Linen with kernels in tiles, and Equinox by functions."""

import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import dstee_jax as dstee
from dstee_jax.tiled_linen import Dense
from dstee_jax.tiled_nnx import Linear, TileIndex, set_dense, set_tiles
from dstee_jax.trees import unwrap

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 16))
Y = jax.random.normal(jax.random.key(2), (6, 8))
LAYERS = 3
STEPS = 5  # the second and the fourth are mask steps


def make(**options):
    """An optimizer whose masks are of tiles of 4 x 4."""
    asked = dict(structure=dstee.structures.tiles((4, 4)), packed=True, sparsity=0.5)
    asked |= dict(total_steps=20, every=2, stop=0.25, key=KEY, drop_fraction=0.5)
    return dstee.transform(optax.adamw(0.1), **(asked | options))


def assert_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        unwrap(a),
        unwrap(b),
    )


def assert_same_masks(a, b):
    masks = [unwrap(dstee.get_state(state).masks) for state in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *masks)


class Network(nnx.Module):
    """Stacked layers that are scanned, and two more; the last one is no `Linear` of ours."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stacked(rngs):
            return Linear(16, 16, rngs=rngs)

        self.blocks = stacked(rngs)
        self.up = Linear(16, 32, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        scan = nnx.scan(
            lambda block, x: jnp.tanh(block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        return self.head(jnp.tanh(self.up(scan(self.blocks, x))))


def loss_of(model, x, y):
    return jnp.mean(jnp.square(model(x) - y))


@nnx.jit(static_argnames="mask_step")
def nnx_step(model, optimizer, x, y, mask_step):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads, mask_step=mask_step)
    return loss


def stack_axes(path, leaf):
    return (0,) if "blocks" in jax.tree_util.keystr(path) else ()


@pytest.fixture
def both():
    """Twice the same network and optimizer, sparse from the start."""
    found = []
    for _ in range(2):
        model = Network(nnx.Rngs(0))
        tx = make(stack_axes=stack_axes)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = dstee.apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state)
        nnx.update(model, params)
        found.append((model, optimizer))
    return found


def test_nnx_trains_in_tiles_as_dense(both):
    (dense, dense_optimizer), (model, optimizer) = both
    dense_steps = dstee.dense_steps_of(optimizer.tx)
    assert list(dense_steps) == [2, 4]
    first = dstee.get_state(optimizer.opt_state).masks
    set_tiles(model, optimizer.opt_state)
    for i in range(1, STEPS + 1):
        if i in dense_steps:
            set_dense(model)
            assert model.up.kernel.shape == (16, 32)
        else:
            assert model.blocks.kernel.shape == (LAYERS, 4, 8, 4)
            assert model.up.kernel.shape == (8, 8, 4)
        losses = [
            nnx_step(*of, X, Y, mask_step=i in dense_steps)
            for of in ((dense, dense_optimizer), (model, optimizer))
        ]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        if i in dense_steps:
            set_tiles(model, optimizer.opt_state)
    assert_same_masks(dense_optimizer.opt_state, optimizer.opt_state)
    last = dstee.get_state(optimizer.opt_state).masks
    assert (unwrap(first)["up"]["kernel"] != unwrap(last)["up"]["kernel"]).any()
    assert_close(dense(X), model(X))
    set_dense(model)
    assert_close(nnx.state(dense, nnx.Param), nnx.state(model, nnx.Param))


def test_nnx_forms_go_through_split_jit_and_back(both):
    model, optimizer = both[0]
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    set_tiles(model, optimizer.opt_state)
    graph, params, index = nnx.split(model, nnx.Param, TileIndex)
    assert len(jax.tree.leaves(index)) == 2
    assert index["blocks"]["tiles"].get_value().shape == (16, 16)
    assert index["blocks"]["tiles"].get_value().index.shape == (LAYERS, 4, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def changed(how, params, index, *given):
        model = nnx.merge(graph, params, index)
        how(model, *given)
        return nnx.split(model, nnx.Param, TileIndex)[1:]

    dense, none = changed(set_dense, params, index)
    again, index_again = changed(set_tiles, dense, none, optimizer.opt_state)
    assert jax.tree.leaves(none) == []
    jax.tree.map(np.testing.assert_array_equal, unwrap(before), unwrap(dense))
    kept = unwrap((params, index)), unwrap((again, index_again))
    assert jax.tree.structure(kept[0]) == jax.tree.structure(kept[1])
    jax.tree.map(np.testing.assert_array_equal, *kept)
    y = model(X)
    np.testing.assert_array_equal(y, nnx.merge(graph, params, index)(X))
    # Once more changes nothing, whether the state or its tiles are given.
    set_tiles(model, optimizer.opt_state)
    set_tiles(model, dstee.tiles(optimizer.opt_state, before))
    np.testing.assert_array_equal(y, model(X))
    set_dense(model)
    set_dense(model)
    jax.tree.map(np.testing.assert_array_equal, unwrap(before), unwrap(nnx.state(model, nnx.Param)))


def test_nnx_trains_with_candidates_without_dense_kernels(both):
    """With all tiles as candidates as dense; from rectangles to rectangles."""
    (dense, dense_optimizer), (model, optimizer) = both
    set_tiles(model, optimizer.opt_state)

    @nnx.jit(static_argnames="candidates")
    def step(model, optimizer, x, y, candidates):
        tiles = set_tiles(model, optimizer.opt_state, candidates=candidates)
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        options = {"tiles": tiles} if candidates else {"mask_step": False}
        optimizer.update(model, grads, **options)
        set_tiles(model, optimizer.opt_state)
        return loss

    for i in range(1, 4):  # the second is a mask step
        due = i in dstee.dense_steps_of(optimizer.tx)
        losses = [
            nnx_step(dense, dense_optimizer, X, Y, mask_step=due),
            step(model, optimizer, X, Y, candidates=np.inf if due else 0.0),
        ]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        assert model.up.kernel.shape == (8, 8, 4)
    assert_same_masks(dense_optimizer.opt_state, optimizer.opt_state)
    tiles = set_tiles(model, optimizer.opt_state, candidates=0.5)
    assert model.up.kernel.shape == unwrap(tiles)["up"]["kernel"].rectangle_shape == (8, 12, 4)
    set_dense(model)
    assert_close(nnx.state(dense, nnx.Param), nnx.state(model, nnx.Param))


def test_nnx_linear_is_that_of_flax():
    ours, theirs = Linear(16, 8, rngs=nnx.Rngs(3)), nnx.Linear(16, 8, rngs=nnx.Rngs(3))
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-6)
    assert ours(X[0]).shape == (8,)
    half = Linear(16, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    optimizer = nnx.Optimizer(half, make(), wrt=nnx.Param)
    assert half(X).dtype == jnp.bfloat16
    set_tiles(half, optimizer.opt_state)
    assert half(X).dtype == jnp.bfloat16
    assert half.kernel.dtype == jnp.float32
    with pytest.raises(
        ValueError, match=r"x has shape \(6, 8\), where a kernel of shape \(16, 8\)"
    ):
        half(Y)


def test_nnx_models_without_our_layers_are_refused():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    with pytest.raises(
        ValueError, match=r"no Linear layer of \[\] is among the tiled \['kernel'\]"
    ):
        set_tiles(model, optimizer.opt_state)
    ours = Linear(16, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="opt_state has no tiles: pass structure="):
        set_tiles(ours, make(structure=None).init(nnx.state(ours, nnx.Param)))


class Scanned(nn.Module):
    """Dense layers of Linen, scanned, and a head."""

    @nn.compact
    def __call__(self, x):
        def block(layer, x, _):
            return jnp.tanh(layer(x)), None

        axes = {"params": 0, "tiles": 0}
        layer = Dense(16, name="blocks")
        x, _ = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)(
            layer, x, None
        )
        return Dense(8, use_bias=False, name="head")(x)


def train(tx, loss, params, in_tiles):
    """Some steps of `loss(params, tiles)`; dense parameters and the state."""
    opt_state = tx.init(params)
    tiles = dstee.tiles(opt_state, params)
    params = dstee.apply_masks(params, opt_state)
    params = dstee.to_tiles(params, tiles) if in_tiles else params
    form = tiles if in_tiles else dstee.no_tiles(tiles)

    @functools.partial(jax.jit, static_argnames="mask_step")
    def step(params, opt_state, tiles, mask_step):
        grads = jax.grad(loss)(params, tiles)
        return dstee.apply(tx, grads, opt_state, params, mask_step=mask_step)

    for i in range(1, STEPS + 1):
        due = i in dstee.dense_steps_of(tx)
        if due and in_tiles:
            params, form = dstee.to_dense(params, form), dstee.no_tiles(form)
        params, opt_state = step(params, opt_state, form, due)
        if due and in_tiles:
            form = dstee.tiles(opt_state, params)
            params = dstee.to_tiles(params, form)
    return dstee.to_dense(params, form), opt_state


def test_linen_trains_in_tiles_as_dense():
    model = Scanned()
    params = model.init(KEY, X)["params"]
    assert params["blocks"]["kernel"].shape == (LAYERS, 16, 16)

    def loss(params, tiles):
        return jnp.mean(jnp.square(model.apply({"params": params, "tiles": tiles}, X) - Y))

    results = [train(make(stack_axes=stack_axes), loss, params, t) for t in (False, True)]
    assert_close(*(params for params, _ in results))
    assert_same_masks(*(opt_state for _, opt_state in results))


def test_linen_dense_is_that_of_flax():
    ours, theirs = Dense(8), nn.Dense(8)
    variables = ours.init(KEY, X)
    assert variables.keys() == {"params"}
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(KEY, X))
    np.testing.assert_allclose(ours.apply(variables, X), theirs.apply(variables, X), rtol=1e-6)
    params = variables["params"]
    tiles = dstee.tiles(make().init(params), params)
    assert Dense(8, dtype=jnp.bfloat16).apply(variables, X).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"kernel has shape \(16, 8\), where its tiles need"):
        ours.apply({"params": params, "tiles": tiles}, X)


def test_equinox_by_functions_trains_in_tiles_as_dense():
    class MLP(eqx.Module):
        up: jax.Array  # (inputs, outputs), where eqx.nn.Linear has (outputs, inputs)
        down: jax.Array

        def __call__(self, x, tiles):
            return dstee.matmul(jnp.tanh(dstee.matmul(x, self.up, tiles.up)), self.down, tiles.down)

    params = MLP(*(jax.random.normal(KEY, shape) / 4 for shape in ((16, 32), (32, 8))))
    results = [
        train(make(), lambda m, tiles: jnp.mean(jnp.square(m(X, tiles) - Y)), params, in_tiles)
        for in_tiles in (False, True)
    ]
    assert_close(*(params for params, _ in results))
    assert_same_masks(*(opt_state for _, opt_state in results))


def test_the_package_needs_no_flax():
    code = "import sys; sys.modules['flax'] = None; import dstee_jax; dstee_jax.matmul"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_with_features_first():
    x = jax.random.normal(jax.random.key(3), (2, 5, 16))
    first = jnp.moveaxis(x, -1, 0)
    model = Linear(16, 8, rngs=nnx.Rngs(0))
    model.bias.set_value(jnp.arange(8.0))
    np.testing.assert_allclose(
        jnp.moveaxis(model(first, axis=0), 0, -1), model(x), rtol=1e-5, atol=1e-6
    )
    dense = Dense(8, bias_init=nn.initializers.normal())
    variables = dense.init(jax.random.key(0), first, axis=0)
    y = dense.apply(variables, x)
    np.testing.assert_allclose(
        jnp.moveaxis(dense.apply(variables, first, axis=0), 0, -1), y, rtol=1e-5, atol=1e-6
    )
