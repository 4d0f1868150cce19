"""Kernels in tiles: masks of tiles, their two forms, products, and training with them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from dstee_jax import scores, structures
from dstee_jax.tiling import products

KEY = jax.random.key(0)


def normal(i, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape, dtype)


def random_tiles(shape, tile, active, seed=0):
    """Tiles with `active` random rows in each column."""
    rng, rows = np.random.default_rng(seed), shape[-2] // tile[0]
    columns = [rng.permutation(rows)[:active] for _ in range(shape[-1] // tile[1])]
    return dstee.Tiles(jnp.asarray(np.sort(columns, axis=-1), jnp.int32), tile, shape)


def close(found, expected, tolerance=1e-5):
    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))

    jax.tree.map(one, found, expected)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- products


@pytest.fixture(scope="module", params=[None, (1, 100), (2, 100), (2, 0)], ids=str)
def groups(request):
    """How many columns of tiles a CPU takes at once, and how many groups without a loop."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            size, unrolled = request.param
            patch.setattr(products, "_at_once", lambda x, kernel: min(size, len(kernel)))
            patch.setattr(products, "UNROLLED", unrolled)
            jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("columns", "most", "size"),
    [(32, 40, 32), (32, 16, 16), (1031, 500, 344), (5, 0, 1), (1, 3, 1)],
)
def test_groups_of_columns_are_equal_but_for_the_last(columns, most, size, monkeypatch):
    x, kernel = jnp.ones((8, 3)), jnp.ones((columns, 4, 2))
    monkeypatch.setattr(products, "GATHERED", most * 4 * 3 * 4)
    assert products._at_once(x, kernel) == size


def test_products_outside_jit_are_compiled_once():
    tiles = random_tiles((16, 12), (2, 4), 3)
    x, kernel = normal(1, (5, 16)), normal(2, tiles.rectangle_shape)
    gradient = jax.grad(lambda x, kernel: jnp.sum(dstee.matmul(x, kernel, tiles)), (0, 1))
    gradient(x, kernel)
    names = []

    def listener(name, *_, **__):
        names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        gradient(x, kernel)
        assert not [name for name in names if "compile" in name]
        gradient(x[:4], kernel)
        assert [name for name in names if "compile" in name]
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.usefixtures("groups")
@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([(1, 4), (2, 2), (4, 8), (8, 4)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.data(),
    st.sampled_from([(), (3,), (2, 3)]),
)
def test_matmul_is_that_of_the_dense_kernel(tile, rows, columns, data, batch):
    shape = (rows * tile[0], columns * tile[1])
    tiles = random_tiles(shape, tile, data.draw(st.integers(1, rows)))
    rng = np.random.default_rng(0)
    x, rectangle = (
        rng.normal(size=n).astype(np.float32) for n in ((*batch, shape[0]), tiles.rectangle_shape)
    )

    def loss(x, kernel, tiles):
        y = dstee.matmul(x, kernel, tiles)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def both(x, rectangle, tiles):
        kernel = dstee.to_dense({"k": rectangle}, {"k": tiles})["k"]
        found, of_tiles = jax.grad(loss, (0, 1), has_aux=True)(x, rectangle, tiles)
        (of_x, of_kernel), dense = jax.grad(loss, (0, 1), has_aux=True)(x, kernel, None)
        again = dstee.to_tiles({"k": kernel}, {"k": tiles})["k"]
        return again, (of_tiles, found), (dense, (of_x, tiles.take(of_kernel)))

    again, found, expected = both(x, rectangle, tiles)
    equal(again, rectangle)
    close(found, expected)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize(
    ("places", "window", "strides", "padding"),
    [
        ((6, 5), (3, 3), 1, "SAME"),
        ((7, 7), (3, 3), 2, "SAME"),
        ((6, 6), (1, 1), 2, "VALID"),
        ((8,), (5,), (2,), ((1, 3),)),
    ],
)
def test_conv_is_that_of_the_dense_kernel(places, window, strides, padding):
    tiles = random_tiles((*window, 8, 12), (2, 4), 3)
    x, rectangle = normal(1, (2, *places, 8)), normal(2, tiles.rectangle_shape)

    def loss(x, kernel, tiles):
        y = dstee.conv(x, kernel, tiles, strides=strides, padding=padding)
        return jnp.sum(jnp.sin(y)), y

    found, of_tiles = jax.grad(loss, (0, 1), has_aux=True)(x, rectangle, tiles)
    kernel = tiles.dense(rectangle)
    expected, dense = jax.grad(loss, (0, 1), has_aux=True)(x, kernel, None)
    close(of_tiles, dense)
    close(found, (expected[0], tiles.take(expected[1])))


@pytest.mark.usefixtures("groups")
def test_bfloat16():
    tiles = random_tiles((64, 32), (8, 8), 3)
    x, rectangle = normal(1, (16, 64), jnp.bfloat16), normal(2, (4, 24, 8), jnp.bfloat16)
    y, found = jax.vjp(lambda *a: dstee.matmul(*a, tiles), x, rectangle)
    dense, expected = jax.vjp(jnp.matmul, x, tiles.dense(rectangle))
    assert y.dtype == jnp.bfloat16
    of_x, of_kernel = expected(dense)
    close((y, *found(dense)), (dense, of_x, tiles.take(of_kernel)), 2e-2)


@pytest.mark.usefixtures("groups")
def test_transformations():
    """jit, vmap over seeds, scan over stacked layers, and remat give what a loop gives."""
    shape, tile = (16, 16), (4, 4)
    layers = [random_tiles(shape, tile, 2, seed) for seed in range(3)]
    stacked = dstee.Tiles(jnp.stack([t.index for t in layers]), tile, shape)
    kernels = normal(1, stacked.rectangle_shape)
    x = normal(2, (5, 16))

    def by_loop(x, kernels):
        for kernel, tiles in zip(kernels, layers, strict=True):
            x = jnp.tanh(dstee.matmul(x, kernel, tiles))
        return jnp.sum(x)

    @jax.remat
    def layer(x, one):
        return jnp.tanh(dstee.matmul(x, *one)), None

    def by_scan(x, kernels):
        return jnp.sum(jax.lax.scan(layer, x, (kernels, stacked))[0])

    close(*(jax.jit(jax.grad(f, (0, 1)))(x, kernels) for f in (by_scan, by_loop)))
    each = [dstee.matmul(x, kernel, tiles) for kernel, tiles in zip(kernels, layers, strict=True)]
    close(jax.vmap(dstee.matmul, (None, 0, 0))(x, kernels, stacked), jnp.stack(each))

    def of_kernel(kernel, tiles):
        return jax.grad(lambda kernel: jnp.sum(jnp.sin(dstee.matmul(x, kernel, tiles))))(kernel)

    each = [of_kernel(kernel, tiles) for kernel, tiles in zip(kernels, layers, strict=True)]
    close(jax.vmap(of_kernel)(kernels, stacked), jnp.stack(each))


@pytest.mark.usefixtures("groups")
def test_gradients_of_gradients():
    tiles = random_tiles((8, 12), (2, 4), 2)
    x, rectangle = normal(1, (3, 8)), normal(2, tiles.rectangle_shape)

    def twice(kernel, tiles):
        def loss(x):
            return jnp.sum(jnp.sin(dstee.matmul(x, kernel, tiles)))

        return jnp.sum(jnp.square(jax.grad(loss)(x)))

    found, expected = (
        jax.grad(twice)(rectangle, tiles),
        jax.grad(twice)(tiles.dense(rectangle), None),
    )
    close(found, tiles.take(expected))


@pytest.mark.usefixtures("groups")
def test_shard_map():
    """Each device has its part of the batch; gradients are those of the whole."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tiles = random_tiles((16, 8), (4, 4), 2)
    x, kernel = normal(1, (8 * 5, 16)), normal(2, tiles.rectangle_shape)

    def loss(kernel, x):
        return jnp.mean(jnp.square(dstee.matmul(x, kernel, tiles)))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def sharded(kernel, x):
        kernel = jax.lax.pcast(kernel, "data", to="varying")
        return jax.lax.pmean(jax.grad(loss)(kernel, x), "data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    def of_x(kernel, x):
        return jax.grad(loss, 1)(kernel, x)

    close(jax.jit(sharded)(kernel, x), jax.grad(loss)(kernel, x))
    close(jax.jit(of_x)(kernel, x), 8 * jax.grad(loss, 1)(kernel, x))


# --- training


def stack_axes(path, leaf):
    return (0,) if "blocks" in jax.tree_util.keystr(path) else ()


def parameters():
    return {
        "first": {"kernel": normal(1, (32, 16)), "bias": jnp.zeros(16)},
        "conv": {"kernel": normal(2, (3, 3, 8, 16))},
        "blocks": {"kernel": normal(3, (2, 16, 16))},
        "one_axis": {"kernel": normal(4, (3, 8, 16))},
    }


def make(inner=None, **options):
    few = dict(sparsity=0.6, total_steps=40, every=4, key=KEY, stack_axes=stack_axes)
    few |= {"structure": structures.tiles((4, 4))} | options
    return dstee.transform(optax.adamw(1e-2) if inner is None else inner, **few)


def gradients(params, step):
    """Of a loss with a part that every step has anew."""
    return jax.tree.map(lambda p: 0.1 * p + normal(step + p.size, p.shape), params)


def train_dense(tx, params, steps):
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    step = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    for i in range(1, steps + 1):
        params, state = step(gradients(params, i), state, params)
    return params, state


def train_in_tiles(tx, params, steps):
    """Rectangles wherever a step allows them."""
    state, dense_steps = tx.init(params), set(dstee.dense_steps_of(tx))
    params = dstee.apply_masks(params, state)
    tiles = dstee.tiles(state, params)
    params = dstee.to_tiles(params, tiles)
    mask_steps = set(dstee.mask_steps_of(tx))
    step = jax.jit(lambda g, s, p, due: dstee.apply(tx, g, s, p, mask_step=due), static_argnums=3)
    for i in range(1, steps + 1):
        whole = dstee.to_dense(params, tiles)
        grads = gradients(whole, i)
        if i in dense_steps:
            whole, state = step(grads, state, whole, i in mask_steps)
            tiles = dstee.tiles(state, whole)
            params = dstee.to_tiles(whole, tiles)
        else:
            params, state = step(dstee.to_tiles(grads, tiles), state, params, False)
    return dstee.to_dense(params, tiles), state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grow_batches": 3},
        {"update_weights": True},
        {"grow": scores.random(), "inner": optax.sgd(0.1, momentum=0.9, nesterov=True)},
        {"structure": structures.tiles((2, 4), score=jnp.max)},
    ],
)
def test_rectangles_train_as_dense_kernels_do(options):
    """Parameters to rounding; masks, counters and explored tiles exactly."""
    params = parameters()
    expected, dense = train_dense(make(**options), params, 17)
    found, tiled = train_in_tiles(make(packed=True, **options), params, 17)
    close(found, expected, 1e-4)
    equal((tiled.masks, tiled.counters), (dense.masks, dense.counters))
    assert float(dstee.exploration_degree(tiled)) > float(dstee.density(tiled))
    kernel = dstee.apply_masks(jax.tree.map(jnp.ones_like, params), tiled)
    weights = [x for x in jax.tree.leaves(kernel) if x.ndim > 1]
    share = sum(float(x.sum()) for x in weights) / sum(x.size for x in weights)
    assert float(dstee.density(tiled)) == pytest.approx(share)


def test_what_is_kept():
    """Masks and counters for tiles, moments as rectangles, and no element gathered by itself."""
    tx, params = make(packed=True), parameters()
    state = tx.init(params)
    assert state.masks["conv"]["kernel"].shape == (1, 1, 2, 4)
    assert state.counters["blocks"]["kernel"].shape == (2, 4, 4)
    tiles = dstee.tiles(state, params)
    mu = state.inner_state[0].mu
    shapes = jax.tree.map(jnp.shape, dstee.to_tiles(params, tiles))
    assert jax.tree.map(jnp.shape, mu) == shapes
    assert tiles["first"]["bias"] is None
    rectangles = dstee.to_tiles(params, tiles)
    text = (
        jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p, mask_step=False))
        .lower(rectangles, state, rectangles)
        .as_text()
    )
    assert "gather" not in text
    assert "scatter" not in text
    text = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p)).lower(params, state, params).as_text()
    sizes = [line for line in text.splitlines() if "stablehlo.gather" in line]
    assert all("tensor<4x" in line or "tensor<2x4x" in line for line in sizes)


def test_the_total_is_as_near_as_tiles_allow():
    shapes = {"a": (64, 48), "b": (48, 32), "c": (32, 16), "d": (3, 3, 16, 16)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        for distribution in (dstee.erk, dstee.uniform):
            tx = make(sparsity=sparsity, distribution=distribution, stack_axes=None)
            state = tx.init(params)
            sizes = [np.prod(shape) for shape in shapes.values()]
            steps = [4 * np.prod(s[:-2], initial=1) * s[-1] for s in shapes.values()]
            off = (float(dstee.density(state)) - (1 - sparsity)) * sum(sizes)
            masks = [state.masks[name]["kernel"] for name in shapes]
            can_fall = [s for s, m in zip(steps, masks, strict=True) if m.sum(-2).min() > 1]
            can_rise = [s for s, m in zip(steps, masks, strict=True) if not m.all()]
            movable = can_fall if off > 0 else can_rise
            assert abs(off) <= max(min(movable, default=np.inf) / 2, 1) + max(steps) / 2


def test_pmean_sends_rectangles():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx, params = make(packed=True), parameters()
    state = tx.init(params)
    tiles = dstee.tiles(state, params)

    def mean(grads, state):
        grads = jax.tree.map(lambda g: g * (1.0 + jax.lax.axis_index("data")), grads)
        return dstee.pmean(grads, state, "data")

    run = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=(P(), P()), out_specs=P()))
    expected = dstee.apply_masks(jax.tree.map(lambda p: 4.5 * p, params), state)
    found = run(params, state)
    close(dstee.to_tiles(found, tiles), dstee.to_tiles(expected, tiles))
    rectangles = dstee.to_tiles(params, tiles)
    close(run(rectangles, state), dstee.to_tiles(expected, tiles))
    text = run.lower(rectangles, state).as_text()
    assert "4x3x3" not in text
    assert "3x3x8x16" not in text


def test_a_checkpoint_holds_either_form(tmp_path):
    tx, params = make(packed=True), parameters()
    params, state = train_in_tiles(tx, params, 6)
    tiles = dstee.tiles(state, params)
    for i, held in enumerate((params, dstee.to_tiles(params, tiles))):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(i), {"params": held, "state": state})
            checkpointer.wait_until_finished()
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": held, "state": state})
            restored = checkpointer.restore(tmp_path / str(i), shapes)
        equal(restored, {"params": held, "state": state})
        dstee.check(tx, restored["state"], parameters())
    equal(dstee.to_dense(restored["params"], tiles), params)


def test_given_masks_and_carry_over():
    tx, params = make(packed=True), parameters()
    state = tx.init(params)
    full = jax.tree.map(lambda p: p != 0, dstee.apply_masks(params, state))
    masks = jax.tree.map(
        lambda full, mask: mask if isinstance(mask, optax.MaskedNode) else full,
        full,
        state.masks,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    for given_masks in (masks, state.masks):
        again = make(packed=True, sparsity=None, masks=given_masks).init(params)
        equal(again.masks, state.masks)
        equal(again.indices, state.indices)
        jitted = jax.jit(make(packed=True, sparsity=None, masks=given_masks).init)(params)
        equal(jitted.masks, state.masks)
    # The same masks, moments whole and in tiles.
    whole = dstee.carry_over(state, make(), params)
    equal(whole.masks, state.masks)
    assert whole.inner_state[0].mu["conv"]["kernel"].shape == (3, 3, 8, 16)
    back = dstee.carry_over(whole, tx, params)
    equal((back.masks, back.counters, back.indices), (state.masks, state.counters, state.indices))
    dense = dstee.carry_over(state, optax.adamw(1e-2), params)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, optax.adamw(1e-2).init(params))


# --- candidates


def few():
    """A convolution and stacked layers."""
    return {name: parameters()[name] for name in ("conv", "blocks")}


def train_with_candidates(tx, params, steps, candidates):
    """Rectangles always: on mask steps with some inactive tiles among the active ones."""
    shapes, mask_steps = jax.eval_shape(lambda: params), set(dstee.mask_steps_of(tx))
    state = tx.init(params)
    params = dstee.to_tiles(params, dstee.tiles(state, params))
    seen = []

    @functools.partial(jax.jit, static_argnames="due")
    def step(params, state, i, due):
        now = tiles = dstee.tiles(state, shapes)
        grads = gradients(dstee.to_dense(params, now), i)
        if due:
            tiles = dstee.tiles(state, shapes, candidates=candidates)
            params = dstee.to_tiles(params, tiles, of=now)
        options = {"tiles": tiles} if due else {"mask_step": False}
        grads = dstee.to_tiles(grads, tiles)
        params, new = dstee.apply(tx, grads, state, params, **options)
        return dstee.to_tiles(params, dstee.tiles(new, shapes), of=tiles), new, tiles

    for i in range(1, steps + 1):
        before = state.masks
        params, state, tiles = step(params, state, i, i in mask_steps)
        if i in mask_steps:
            seen.append((before, state.masks, tiles))
    return dstee.to_dense(params, dstee.tiles(state, shapes)), state, seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "update_weights": True,
            "grow": scores.random(),
            "structure": structures.tiles((1, 4), score=jnp.max),
            "distribution": dstee.uniform,
        },
    ],
)
def test_with_all_tiles_as_candidates_a_mask_step_is_the_dense_one(options):
    """Bit for bit: parameters, masks, counters and moments, from moments that are not zero."""
    tx, shapes = make(packed=True, **options), jax.eval_shape(few)

    @jax.jit
    def first():
        params = few()
        state = tx.init(params)._replace(count=jnp.int32(2))
        tiles = dstee.tiles(state, params)
        grads = dstee.to_tiles(gradients(params, 1), tiles)
        params = dstee.to_tiles(params, tiles)
        params, state = dstee.apply(tx, grads, state, params, mask_step=False)
        return params, state, gradients(few(), 2)

    @jax.jit
    def dense(params, state, grads):
        return dstee.apply(tx, grads, state, dstee.to_dense(params, dstee.tiles(state, shapes)))

    @jax.jit
    def among(params, state, grads):
        tiles = dstee.tiles(state, shapes, candidates=np.inf)
        params = dstee.to_tiles(params, tiles, of=dstee.tiles(state, shapes))
        grads = dstee.to_tiles(grads, tiles)
        params, state = dstee.apply(tx, grads, state, params, tiles=tiles)
        return dstee.to_dense(params, tiles), state

    before = first()
    (expected, after), found = dense(*before), among(*before)
    equal(found, (expected, after))
    for name in few() if options else ("blocks",):  # a column of the convolution has one tile of 4
        assert (after.masks[name]["kernel"] != before[1].masks[name]["kernel"]).any()


def tiled_rows(mask, like):
    """A mask of tiles as (..., columns, rows)."""
    return np.swapaxes(np.reshape(mask, (*like[:-2], -1, like[-2])), -1, -2)


@pytest.mark.parametrize("grow", [scores.acquisition(), scores.random()])
def test_only_candidates_grow(grow):
    tx = make(packed=True, grow=grow, structure=structures.tiles((1, 4)), sparsity=0.75)
    params, state, seen = train_with_candidates(tx, few(), 12, 0.5)
    equal(dstee.apply_masks(params, state), params)
    grown, draws = 0, set()
    for before, after, tiles in seen:
        for name in few():
            at = tiles[name]["kernel"]
            index = np.asarray(at.index)
            old, new = (tiled_rows(m[name]["kernel"], index.shape) for m in (before, after))
            among = np.zeros_like(old)
            np.put_along_axis(among, index, True, axis=-1)
            active = old.sum(-1)
            assert (old & ~among).sum() == (new & ~among).sum() == 0
            assert (among.sum(-1) == np.minimum(np.ceil(1.5 * active), at.rows)).all()
            assert (new.sum(-1) == active).all()
            grown += (new & ~old).sum()
        draws.add(np.asarray(tiles["blocks"]["kernel"].index).tobytes())
    assert grown > 0
    assert len(draws) == len(seen)  # each round has others


def test_the_best_candidates_grow():
    """A kernel of 8 x 1 tiles: gradients of candidates alone count, and grown weights are zero."""
    params = {"kernel": jnp.arange(1.0, 33).reshape(8, 4)}
    options = dict(structure=structures.tiles((1, 4)), every=1, update_weights=True)
    options |= dict(drop_fraction=0.5, grow=scores.gradient(), stack_axes=None)
    masks = {"kernel": np.repeat(np.arange(8) < 2, 4).reshape(8, 4)}
    tx = make(optax.sgd(1.0), packed=True, sparsity=None, masks=masks, **options)
    state = tx.init(params)
    tiles = {"kernel": dstee.Tiles(jnp.array([[0, 1, 4, 6]], jnp.int32), (1, 4), (8, 4))}
    grads = {"kernel": jnp.repeat(jnp.array([0.0, 0, 5, 9, 1, 8, 2, 7]), 4).reshape(8, 4)}
    wide = dstee.to_tiles(dstee.apply_masks(params, state), tiles)
    new, state = dstee.apply(tx, dstee.to_tiles(grads, tiles), state, wide, tiles=tiles)
    assert state.masks["kernel"].ravel().tolist() == [False, True, *[False] * 4, True, False]
    assert state.indices["kernel"].tolist() == [[1, 6]]
    assert state.counters["kernel"].ravel().tolist() == [1, 2, 0, 0, 0, 0, 1, 0]
    assert new["kernel"].tolist() == [[[0] * 4, [5, 6, 7, 8], [0] * 4, [0] * 4]]


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("window", [(), (3,)])
def test_products_beside_candidates(window):
    """Those of the active tiles, bit for bit; the kernel has the gradients of all tiles."""
    narrow, wide = (random_tiles((*window, 16, 12), (2, 4), n) for n in (3, 8))
    wide = dataclasses.replace(wide, active=narrow.index)  # of all rows: places are rows
    rectangle = normal(1, narrow.rectangle_shape)
    x = normal(2, (2, 7, 16) if window else (5, 16))
    product = dstee.conv if window else dstee.matmul

    def run(x, kernel, tiles):
        y, gradients = jax.vjp(lambda x, kernel: product(x, kernel, tiles), x, kernel)
        return y, *gradients(jnp.sin(y))

    zero_beside = wide.moved_from(narrow)(rectangle, wide.zeros(jnp.float32))
    *found, of_kernel = run(x, zero_beside, wide)
    *expected, of_active = run(x, rectangle, narrow)
    equal(found, expected)
    close(narrow.take(wide.dense(of_kernel)), of_active)
    close(wide.dense(of_kernel), run(x, narrow.dense(rectangle), None)[-1])


def test_no_dense_array_is_made_of_candidates():
    """Nothing as large as the kernel, from the loss to the new parameters."""
    shapes = {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    tx = make(packed=True, sparsity=0.75, stack_axes=None)
    state = jax.eval_shape(tx.init, shapes)

    def step(params, state, x):
        now = dstee.tiles(state, shapes)
        tiles = dstee.tiles(state, shapes, candidates=1.0)
        params = dstee.to_tiles(params, tiles, of=now)
        loss = lambda p: jnp.sum(dstee.matmul(x, p["kernel"], tiles["kernel"]) ** 2)  # noqa: E731
        params, state = dstee.apply(tx, jax.grad(loss)(params), state, params, tiles=tiles)
        return dstee.to_tiles(params, dstee.tiles(state, shapes), of=tiles), state

    params = jax.eval_shape(lambda p, s: dstee.to_tiles(p, dstee.tiles(s, shapes)), shapes, state)
    assert params["kernel"].shape == (24, 16, 4)
    text = jax.jit(step).lower(params, state, jax.ShapeDtypeStruct((4, 64), jnp.float32)).as_text()
    sizes = [np.prod([*map(int, n)]) for n in map(split, re.findall(r"tensor<([\dx]+)x\w+>", text))]
    assert max(sizes) == 64 * 96 / 2


def split(sizes):
    return sizes.split("x")


def test_updates_and_pmean_of_rectangles_with_candidates():
    tx, params = OF.tx, OF.wide
    state = OF.state._replace(count=jnp.int32(3))  # a mask step follows
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def mean(grads, state):
        grads = jax.tree.map(lambda g: g * (1.0 + jax.lax.axis_index("data")), grads)
        return dstee.pmean(grads, state, "data")

    @jax.jit
    def both(grads, params, state):
        updates, after = tx.update(grads, state, params, tiles=OF.more)
        new = dstee.apply(tx, grads, state, params, tiles=OF.more)
        return (optax.apply_updates(params, updates), after), new

    found, expected = both(params, params, state)
    equal(found, expected)
    run = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=(P(), P()), out_specs=P()))
    close(run(params, state), jax.tree.map(lambda g: 1.5 * g, params))


# --- errors


class Example:
    """A network in tiles; made when a test first asks for it, not when tests are collected."""

    @functools.cached_property
    def tx(self):
        return make(packed=True)

    @functools.cached_property
    def state(self):
        return jax.jit(self.tx.init)(parameters())

    @functools.cached_property
    def tiles(self):
        return dstee.tiles(self.state, parameters())

    @functools.cached_property
    def short(self):
        return dstee.to_tiles(parameters(), self.tiles)

    @functools.cached_property
    def more(self):
        return dstee.tiles(self.state, parameters(), candidates=0.5)

    @functools.cached_property
    def wide(self):
        return dstee.to_tiles(parameters(), self.more)

    @functools.cached_property
    def one(self):
        return random_tiles((8, 8), (4, 4), 1)


OF = Example()


def step(tx, grads, params, state=None, **options):
    return dstee.apply(tx, grads, OF.state if state is None else state, params, **options)


def parameters_as(tiles):
    return jax.tree.map(lambda _: tiles, parameters())


def grows_by_several_batches(params, tiles):
    tx = make(packed=True, grow_batches=2)
    return dstee.apply(tx, params, tx.init(parameters()), params, tiles=tiles)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dstee.matmul(jnp.ones((0, 8)), jnp.ones((2, 4, 4)), OF.one),
            r"x of shape \(0, 8\) has no examples for a kernel of shape \(2, 4, 4\)",
        ),
        (
            lambda: dstee.matmul(jnp.ones((2, 6)), jnp.ones((2, 4, 4)), OF.one),
            r"x has shape \(2, 6\)",
        ),
        (lambda: dstee.matmul(jnp.ones((2, 8)), jnp.ones((8, 8)), OF.one), r"\(8, 8\), where its"),
        (lambda: dstee.matmul(jnp.ones((2, 8)), jnp.ones((2, 4, 4))), "a rectangle needs tiles="),
        (
            lambda: dstee.matmul(jnp.ones((2, 8)), jnp.ones((2, 8, 4)), OF.one),
            r"rectangle \(2, 4, 4\) of a dense \(8, 8\)",
        ),
        (
            lambda: dstee.conv(jnp.ones((2, 5, 5, 8)), jnp.ones((2, 4, 4)), OF.one),
            r"kernel of shape \(8, 8\)",
        ),
        (
            lambda: dstee.conv(jnp.ones((2, 5, 8)), jnp.ones((2, 4, 4))),
            "needs \\(batch, \\*places, inputs\\)|rectangle needs tiles=",
        ),
        (lambda: dstee.to_tiles(OF.short, OF.tiles), r"has shape .* the dense kernel is"),
        (lambda: dstee.to_dense(parameters(), OF.tiles), r"has shape .* the rectangle"),
        (lambda: dstee.to_tiles({"a": jnp.ones(3)}, OF.tiles), "tiles have 5 leaves and params 1"),
        (lambda: dstee.tiles(OF.state, OF.short), "pass the dense parameters"),
        (
            lambda: dstee.tiles(make(structure=None).init(parameters()), parameters()),
            "opt_state has no tiles",
        ),
        (
            lambda: step(OF.tx, OF.short, OF.short),
            r"rectangle of tiles, and a mask step needs .* dense",
        ),
        (
            lambda: step(OF.tx, parameters(), OF.short, mask_step=False),
            r"grads of .* has shape .*, the parameter",
        ),
        (
            lambda: step(make(), OF.short, OF.short, make().init(parameters()), mask_step=False),
            "pass packed=True",
        ),
        (
            lambda: step(OF.tx, *[{**parameters(), "conv": {"kernel": jnp.ones((5, 7))}}] * 2),
            r"conv/kernel has shape \(5, 7\), where its tiles of \(4, 4\) need",
        ),
        (
            lambda: dstee.tiles(OF.state, parameters(), candidates=-1),
            "candidates=-1 must be 0 or more",
        ),
        (
            lambda: dstee.to_tiles(parameters(), OF.more, of=OF.tiles),
            r"has shape \(2, 16, 16\), where its tiles .* the rectangle \(2, 4, 8, 4\)",
        ),
        (
            lambda: dstee.to_tiles(OF.short, parameters_as(OF.one), of=OF.tiles),
            r"in tiles of \(4, 4\) of a kernel of shape .*, and asked for in .* of \(8, 8\)",
        ),
        (
            lambda: step(OF.tx, OF.short, OF.short, tiles=OF.more),
            r"has shape \(2, 4, 8, 4\), where its tiles .* the rectangle \(2, 4, 12, 4\)",
        ),
        (
            lambda: step(OF.tx, OF.short, OF.wide, tiles=OF.more),
            r"grads of .* has shape .*, the parameter",
        ),
        (
            lambda: step(OF.tx, OF.short, OF.short, tiles=OF.tiles),
            r"of shape \(2, 4, 8, 4\) has the 2 active tiles of each column and no candidates",
        ),
        (
            lambda: step(make(), OF.wide, OF.wide, make().init(parameters()), tiles=OF.more),
            "pass packed=True",
        ),
        (lambda: grows_by_several_batches(OF.wide, OF.more), "grow_batches=2 sums gradients"),
        (
            lambda: step(
                *(OF.tx, {"kernel": jnp.ones((2, 4, 4))}, {"kernel": jnp.ones((2, 4, 4))}),
                make(packed=True, sparsity=0.5).init({"kernel": jnp.ones((16, 8))}),
                tiles={"kernel": OF.one},
            ),
            r"of tiles \(2, 1\), and opt_state has \(2, 2\)",
        ),
        (
            lambda: make(plan=dstee.plans.exchange(of_all=True)),
            "structure= keeps the count of every leaf",
        ),
        (
            lambda: make(stack_axes=lambda path, leaf: (2,) if leaf.ndim == 3 else ()).init(
                {"kernel": jnp.ones((8, 8, 2))}
            ),
            "must be the first ones|do not divide",
        ),
    ],
)
def test_errors_name_both_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_memory_reads_every_gradient():
    tx = make(memory=dstee.memory.dense_momentum(), grow=scores.momentum(), packed=True)
    assert dstee.dense_steps_of(tx) == range(1, 41)
    state = tx.init(parameters())
    with pytest.raises(ValueError, match="memory= reads all weights on each step"):
        dstee.apply(tx, OF.short, state, OF.short, mask_step=False)


def test_a_state_can_be_donated_beside_its_tiles():
    state = jax.tree.map(jnp.copy, OF.state)
    tiles = dstee.tiles(state, parameters())
    jax.jit(lambda state, tiles: state, donate_argnums=0)(state, tiles)
    assert all(not x.is_deleted() for x in jax.tree.leaves(tiles))


def test_tiles_are_a_pytree_with_one_array():
    leaves, treedef = jax.tree.flatten(OF.one)
    assert len(leaves) == 1
    again = jax.tree.unflatten(treedef, leaves)
    assert (again.tile, again.shape) == (OF.one.tile, OF.one.shape)
    equal(again.index, OF.one.index)
    assert jax.tree.leaves(dstee.no_tiles(OF.tiles)) == []


# --- features first


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_matmul_with_features_first(batch):
    tiles = random_tiles((8, 12), (2, 4), 3)
    x, rectangle = normal(1, (*batch, 8)), normal(2, tiles.rectangle_shape)
    first = jnp.moveaxis(x, -1, 0)

    def loss(x, kernel, tiles, axis):
        y = dstee.matmul(x, kernel, tiles, axis=axis)
        return jnp.sum(jnp.sin(y)), y

    for kernel, at in ((rectangle, tiles), (tiles.dense(rectangle), None)):
        (of_x, of_kernel), y = jax.grad(loss, (0, 1), has_aux=True)(first, kernel, at, 0)
        (for_x, for_kernel), expected = jax.grad(loss, (0, 1), has_aux=True)(x, kernel, at, -1)
        close((jnp.moveaxis(y, 0, -1), jnp.moveaxis(of_x, 0, -1)), (expected, for_x))
        close(of_kernel, for_kernel)
    with pytest.raises(ValueError, match="axis=1 of x must be -1, features last, or 0"):
        dstee.matmul(x, rectangle, tiles, axis=1)
    with pytest.raises(ValueError, match=r"x has shape \(9,.* needs 8 on the first axis"):
        dstee.matmul(jnp.ones((9, 8)), rectangle, tiles, axis=0)
    with pytest.raises(ValueError, match=r"dense kernel of shape \(8, 12\).*\(inputs, \.\.\.\)"):
        dstee.matmul(jnp.ones((9, 8)), tiles.dense(rectangle), axis=0)
