"""Parameters over 8 devices, Auto and Explicit axes; gradients averaged sparsely."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src.dispatch import runtime_tokens
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from benchmarks.collectives import collectives
from dstee_jax import methods, scores, structures
from tests.test_packed import close, equal, make, tree

# Two matrices of one shape that lie in different ways, stacked layers, and a bias.
SHAPES = {"up": {"kernel": (16, 16)}, "out": {"kernel": (16, 16)}, "all": {"kernel": (3, 8, 12)}}
SPECS = {"up": P("fsdp", "tp"), "out": P("tp", "fsdp"), "all": P(None, None, "fsdp"), "bias": P()}
GATHERS = {"all-gather", "all-to-all", "collective-permute"}


def stack_axes(path, leaf):
    return (0,) if path[0].key == "all" else ()


def mesh_of(axis_type):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(axis_type,) * 2)


def place(params, mesh):
    def one(path, x):
        return jax.device_put(x, NamedSharding(mesh, SPECS[path[0].key]))

    return jax.tree_util.tree_map_with_path(one, params)


def steps(tx, params, state, n=7):
    def step(params, state, grads):
        grads = jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
        return dstee.apply(tx, grads, state, params)

    run = None
    for i in range(n):
        shapes = jax.tree.map(jnp.shape, params)
        grads = jax.tree.map(
            lambda g, p: jax.device_put(g, p.sharding), tree(100 + i, shapes), params
        )
        run = run or jax.jit(step).lower(params, state, grads).compile()
        params, state = run(params, state, grads)
    return params, state, run


@functools.cache
def on_one(packed):
    params = tree(0, SHAPES | {"bias": (16,)})
    blocks = dstee.blocks_of(place(params, mesh_of(AxisType.Auto))) if packed else None
    tx = make(packed=packed, stack_axes=stack_axes, blocks=blocks)
    state = tx.init(params)
    return steps(tx, dstee.apply_masks(params, state), state)[:2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_is_the_same_and_gathers_nothing(axis_type, packed):
    mesh = mesh_of(axis_type)
    selection = "sharded" if axis_type == AxisType.Auto else "auto"
    with jax.set_mesh(mesh):
        params = place(tree(0, SHAPES | {"bias": (16,)}), mesh)
        blocks = dstee.blocks_of(params) if packed else None
        tx = make(packed=packed, stack_axes=stack_axes, selection=selection, blocks=blocks)
        shardings = dstee.state_shardings(jax.eval_shape(tx.init, params), params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        for leaf in jax.tree.leaves((state.masks["up"], state.counters["up"])):
            assert leaf.sharding.is_equivalent_to(params["up"]["kernel"].sharding, 2)
        new, new_state, program = steps(tx, dstee.apply_masks(params, state), state)
    expected, expected_state = on_one(packed)
    close(jax.device_get(new), expected)
    equal(jax.device_get(new_state.masks), expected_state.masks)
    moments = new_state.inner_state[0].trace["up"]["kernel"]
    assert moments.sharding.spec == SPECS["up"]
    sent = collectives(program.as_text())
    assert any(c.kind == "all-reduce" for c in sent) or packed  # the counts, if not by block
    assert not {c.kind for c in sent} & GATHERS
    assert all(np.prod(shape) <= 8 for c in sent for _, shape in c.shapes)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_counts_of_all_leaves_travel_together(axis_type):
    """One search for what is dropped and one for what grows, whatever the number of leaves."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    found = []
    for leaves in (2, 10):
        with jax.set_mesh(mesh):
            spec = NamedSharding(mesh, P("fsdp"))
            params = {
                f"{chr(97 + i)}/kernel": jax.ShapeDtypeStruct(
                    (16, 8 + 2 * i), jnp.float32, sharding=spec
                )
                for i in range(leaves)
            }
            tx = make(selection="sharded" if axis_type == AxisType.Auto else "auto")
            bare = jax.eval_shape(tx.init, params)
            state = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                bare,
                dstee.state_shardings(bare, params),
            )
            program = jax.jit(tx.update).lower(params, state, params).compile()
        sent = collectives(program.as_text())
        assert {c.kind for c in sent} == {"all-reduce"}
        found.append((len(sent), sum(c.trips for c in sent)))
    assert found[0] == found[1]
    assert found[1][0] <= 12
    assert found[1][1] <= 70


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_top_k_would_gather(axis_type):
    """The check above can fail."""
    mesh = mesh_of(axis_type)
    tx = make(selection="top_k", stack_axes=stack_axes)
    with jax.set_mesh(mesh):
        params = place({"up": {"kernel": jnp.ones((16, 16))}}, mesh)
        state = jax.jit(tx.init)(params)
        if axis_type == AxisType.Explicit:
            with pytest.raises(Exception, match="should be unsharded"):
                jax.jit(tx.update).lower(params, state, params)
            return
        program = jax.jit(tx.update).lower(params, state, params).compile()
    sent = collectives(program.as_text())
    assert any(np.prod(s) >= 128 for c in sent if c.kind in GATHERS for _, s in c.shapes)


# Rules that look at a kernel as a whole. Name: what makes the optimizer, and of which kernels.
WHOLE = {
    "constant_fan_in": dict(make=methods.rigl, structure=structures.constant_fan_in()),
    "channels": dict(make=methods.rigl, structure=structures.channels()),
    "n_m": dict(make=methods.rigl, structure=structures.n_m(2, 4), sparsity=0.5),
    "srigl": dict(make=methods.srigl),
    "stacked": dict(make=methods.srigl, stack_axes=stack_axes),
    "cht": dict(make=methods.cht),
    "chain": dict(make=methods.cht, chain=("down/kernel", "up/kernel"), grow=scores.ch3_l3n()),
    "chts": dict(make=methods.chts, drop=scores.sampled(scores.relative_importance())),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_sees_whole_kernels_runs_over_explicit_axes(name):
    options = dict(sparsity=0.8, total_steps=20, every=3, key=jax.random.key(0)) | WHOLE[name]
    make_of = options.pop("make")
    tx = make_of(optax.sgd(0.1), distribution=dstee.uniform, **options)
    specs = {"down": P(None, "tp"), "up": P("fsdp", "tp"), "all": P(None, "tp", "fsdp")}
    some = {"stacked": ["all"], "chain": ["down", "up"]}.get(name, ["up"])
    shapes = {"down": {"kernel": (32, 16)}, "up": {"kernel": (16, 48)}, "all": SHAPES["all"]}
    params, mesh = tree(0, {key: shapes[key] for key in some}), mesh_of(AxisType.Explicit)
    laid = {
        key: {"kernel": jax.device_put(x["kernel"], NamedSharding(mesh, specs[key]))}
        for key, x in params.items()
    }

    @jax.jit
    def run(params):
        state = first = tx.init(params)
        new = dstee.apply_masks(params, state)
        for _ in range(4):
            new, state = dstee.apply(tx, params, state, new)
        return first.masks, state.masks

    before, expected = jax.device_get(run(params))
    with jax.set_mesh(mesh):
        first, found = run(laid)
        jax.tree.map(lambda m, w: None if m.sharding == w.sharding else 1 / 0, found, laid)
        equal(jax.device_get(tx.init(laid).masks), before)
    equal(jax.device_get((first, found)), (before, expected))
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(expected), strict=True)
    assert any((a != b).any() for a, b in pairs)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nothing_is_made_whole_at_init(axis_type):
    mesh = mesh_of(axis_type)
    tx = make(optax.adam(0.1))
    with jax.set_mesh(mesh):
        place_ = NamedSharding(mesh, P("fsdp", "tp"))
        params = {"kernel": jax.ShapeDtypeStruct((1024, 2048), jnp.float32, sharding=place_)}
        shardings = dstee.state_shardings(jax.eval_shape(tx.init, params), params)
        program = jax.jit(tx.init, out_shardings=shardings).lower(params).compile()
    memory = program.memory_analysis()
    part = 1024 * 2048 // 8
    assert memory.output_size_in_bytes <= (1 + 2 + 8) * part + 1000
    assert memory.temp_size_in_bytes <= 24 * part  # one array of random bits takes 32 * part
    sent = collectives(program.as_text())
    assert all(np.prod(s) <= 8 for c in sent for _, s in c.shapes)


def test_eager_init_lies_as_the_parameters_do():
    params = place({"up": {"kernel": jnp.ones((16, 16))}}, mesh_of(AxisType.Auto))
    for tx in (make(), make(sparsity=None, masks={"up": {"kernel": np.eye(16, dtype=bool)}})):
        state = tx.init(params)
        for leaf in jax.tree.leaves((state.masks, state.counters, state.inner_state)):
            assert leaf.sharding.is_equivalent_to(params["up"]["kernel"].sharding, 2)


def test_accumulated_gradients_are_exact_when_sharded():
    options = {"grow_batches": 2, "grow": scores.gradient()}
    params = tree(0, SHAPES | {"bias": (16,)})
    tx = make(**options)
    state = tx.init(params)
    _, expected, _ = steps(tx, dstee.apply_masks(params, state), state, 6)
    mesh = mesh_of(AxisType.Auto)
    tx = make(selection="sharded", **options)
    params = place(params, mesh)
    shardings = dstee.state_shardings(jax.eval_shape(tx.init, params), params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    _, state, _ = steps(tx, dstee.apply_masks(params, state), state, 6)
    equal(jax.device_get(state.masks), expected.masks)


def test_states_of_nnx_lie_as_their_parameters():
    model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    mesh = mesh_of(AxisType.Auto)
    places = {"kernel": P("fsdp", "tp"), "bias": P()}
    params = nnx.state(model, nnx.Param)
    for name, spec in places.items():
        place_ = NamedSharding(mesh, spec)
        params[name].set_value(jax.device_put(params[name].get_value(), place_))
    shapes = jax.eval_shape(make().init, params)
    shardings = dstee.state_shardings(shapes, params)
    for tree_ in (shardings.masks, shardings.counters, shardings.inner_state[0].trace):
        (kernel,) = [s for s in jax.tree.leaves(tree_) if s.spec]
        assert kernel.spec == P("fsdp", "tp")


def test_a_module_named_as_a_field_of_the_state_keeps_its_own_sharding():
    mesh, specs = mesh_of(AxisType.Auto), {"mu": P("tp", "fsdp"), "nu": P(None, "fsdp")}
    whole = {"Dense_0": {"kernel": P("fsdp", "tp")}}
    heads = {name: {"Dense_0": {"kernel": spec}} for name, spec in specs.items()}
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), whole | heads | {"count": {"bias": P("tp")}}
    )
    params = jax.tree.map(
        lambda s: jnp.ones((16,) * (2 if "fsdp" in s.spec else 1), device=s), places
    )
    inner = optax.chain(optax.masked(optax.adam(0.1), {**dict.fromkeys(params, True), "nu": False}))
    tx = make(inner, memory=dstee.memory.dense_momentum())
    shapes = jax.eval_shape(tx.init, params)
    found = dstee.state_shardings(shapes, params)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    kernels = {name: place for name, place in places.items() if name != "count"}
    for tree_ in (found.masks, found.counters, found.rule_state.memory):
        assert {name: tree_[name] for name in kernels} == kernels
    adam = found.inner_state[0].inner_state[0]
    for moments in (adam.mu, adam.nu):
        assert isinstance(moments["nu"], optax.MaskedNode)
        others = {name: place for name, place in places.items() if name != "nu"}
        assert {name: moments[name] for name in others} == others
    scalars = found.count, found.needs_dense, found.key, adam.count
    assert all(s.spec == P() for s in scalars)


def test_packed_leaves_over_explicit_axes_need_blocks():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = place({"up": {"kernel": jnp.ones((16, 16))}}, mesh)
        with pytest.raises(ValueError, match=r"up/kernel is split .*blocks=dstee.blocks_of"):
            jax.jit(make(packed=True).init).lower(params)
    blocks = dstee.blocks_of(params)
    with pytest.raises(ValueError, match="given no kernel: pass it the same tree"):
        make(packed=True, blocks=blocks).init({"kernel": jnp.ones((16, 16))})


def test_parameters_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match=r"kernel has sharding .*jax\.device_put"):
        dstee.state_shardings({}, {"kernel": jnp.ones((2, 2))})


# ---------------------------------------------------------------------------- pmean

X = jax.random.normal(jax.random.key(5), (16, 16))
PARAMS = {"kernel": jax.random.normal(jax.random.key(6), (16, 24)), "bias": jnp.ones(24)}
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"])) ** 2)


def train_step(tx, params, state, x, **options):
    varying = jax.lax.pcast(params, "data", to="varying")
    grads = dstee.pmean(jax.grad(loss)(varying, x), state, "data", **options)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def parallel(tx, **options):
    return jax.jit(
        jax.shard_map(
            functools.partial(train_step, tx, **options),
            mesh=MESH,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
        )
    )


def run(tx, step, n=7):
    state = tx.init(PARAMS)
    params = dstee.apply_masks(PARAMS, state)
    for i in range(n):
        params, state = step(params, state, jnp.roll(X, i, 0))
    return params, state


@pytest.mark.parametrize("how", ["packed", "indices"])
def test_pmean_is_one_device(how):
    tx = make(optax.adam(0.01), **{how: True})

    @jax.jit
    def alone(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = run(tx, alone)
    new, state = run(tx, parallel(tx, check=True))
    close(new, expected)
    equal(state.masks, expected_state.masks)
    equal(state.counters, expected_state.counters)


def test_pmean_that_is_told_which_steps_are_dense():
    tx = make(optax.adam(0.01), packed=True)
    known = {dense: parallel(tx, dense=dense) for dense in (False, True)}
    steps, asked = iter(range(1, 8)), parallel(tx)
    told = run(tx, lambda *args: known[next(steps) in dstee.dense_steps_of(tx)](*args))
    equal(told, run(tx, asked))
    params, state = run(tx, known[False])  # a broken promise: nothing is exchanged
    equal(state.masks, tx.init(PARAMS).masks)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    for dense, conditionals in ((None, 1), (False, 0), (True, 0)):
        program = jax.shard_map(
            lambda g, s, dense=dense: dstee.pmean(g, s, "data", dense=dense),
            mesh=MESH,
            in_specs=P(),
            out_specs=P(),
            check_vma=False,
        )
        text = jax.jit(program).lower(PARAMS, tx.init(PARAMS)).as_text()
        assert text.count("stablehlo.case") == conditionals


def test_pmean_of_bfloat16_on_the_wire():
    tx = make(optax.sgd(0.01), indices=True)
    step = parallel(tx, wire_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    text = step.lower(PARAMS, state, X).as_text()
    reduced = [line for line in text.splitlines() if "stablehlo.all_reduce" in line]
    assert len(reduced) >= 2
    assert "bf16" in text
    close(run(tx, step)[0], run(tx, parallel(tx))[0], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("once", "trips"), [(True, 1), (False, 16)])
def test_collectives_in_a_loop(once, trips):
    """A loop whose body ends it runs once; of another without a known count, as often as said."""

    def total(x, go):
        def body(carry):
            go, x = carry
            x = jax.lax.psum(x, "data")
            return go & False if once else x.sum() < 1e9, x

        return jax.lax.while_loop(lambda carry: carry[0], body, (go, x))[1]

    program = jax.shard_map(total, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    (sent,) = collectives(jax.jit(program).lower(jnp.ones(4), True).compile().as_text())
    assert (sent.trips, sent.bytes) == (trips, 16 * trips)


def test_pmean_sends_the_active_entries():
    tx = make(optax.sgd(0.1), sparsity=0.95, indices=True, every=100, total_steps=10_000)
    params = {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}
    program = jax.jit(
        jax.shard_map(
            lambda g, s: dstee.pmean(g, s, "data"),
            mesh=MESH,
            in_specs=(P(), P()),
            out_specs=P(),
            check_vma=False,
        )
    )
    sent = collectives(program.lower(params, tx.init(params)).compile().as_text())
    dense = sum(c.bytes for c in sent if c.branches == (1,))
    active = sum(c.bytes for c in sent if c.branches == (0,))
    assert dense == 4 * (256 * 512 + 512)
    assert active == 4 * (round(0.05 * 256 * 512) + 512)
    assert (99 * active + dense) / 100 <= 0.065 * dense


def test_parameters_in_a_tuple():
    params = (jnp.ones((16, 24)), jnp.ones(24))
    state = make(indices=True).init(params)
    mean = jax.shard_map(
        lambda g, s: dstee.pmean(g, s, "data"),
        mesh=MESH,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    assert int(jax.jit(mean)(params, state)[0].sum()) == 96


def test_gradients_that_are_read_densely_travel_densely():
    tx = dstee.methods.snfs(optax.sgd(0.1), sparsity=0.8, total_steps=20, key=KEY_, every=5)
    assert bool(tx.init(PARAMS).needs_dense)
    state = make(every=2).init(PARAMS)
    assert not bool(state.needs_dense)
    _, state = make(every=2).update(PARAMS, state, PARAMS)
    assert bool(state.needs_dense)


KEY_ = jax.random.key(0)


def test_replicas_that_differ_are_found():
    tx = make(optax.sgd(0.01), indices=True)
    state = tx.init(PARAMS)

    def agree(state):
        i = jax.lax.axis_index("data")
        mask = state.masks["kernel"].at[0, 3].set(state.masks["kernel"][0, 3] ^ (i == 5))
        other = state._replace(masks=state.masks | {"kernel": mask})
        return dstee.replicas_agree(state, "data"), dstee.replicas_agree(other, "data")

    same, other = jax.jit(
        jax.shard_map(agree, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    )(state)
    assert bool(same)
    assert not bool(other)

    def broken(params, state, x):
        mask = state.masks["kernel"] ^ (jax.lax.axis_index("data") == 5)
        return train_step(
            tx, params, state._replace(masks=state.masks | {"kernel": mask}), x, check=True
        )

    spread = jax.shard_map(
        broken, mesh=MESH, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
    )

    def go():
        jax.block_until_ready(jax.jit(spread)(PARAMS, state, X))
        jax.effects_barrier()

    with pytest.raises(Exception, match="differ between devices: start all from one state"):
        go()
    runtime_tokens.clear()  # else JAX raises the other devices' errors again at the exit


def test_pmean_refuses_a_traced_dense():
    tx = make(packed=True)
    with pytest.raises(ValueError, match=r"dense=.* static argument of jit"):
        jax.jit(lambda d: dstee.pmean(PARAMS, tx.init(PARAMS), "data", dense=d))(True)


def test_pmean_refuses():
    tx = make(optax.sgd(0.01))
    with pytest.raises(ValueError, match="pass packed=True or indices=True"):
        dstee.pmean(PARAMS, tx.init(PARAMS), "data")
    tx = make(optax.sgd(0.01), indices=True)
    with pytest.raises(ValueError, match="params has no leaf"):
        dstee.state_shardings({}, {})

    def summed(params, state, x):
        return dstee.pmean(jax.grad(loss)(params, x), state, "data")

    spread = jax.shard_map(summed, mesh=MESH, in_specs=(P(), P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"pcast\(params, 'data', to='varying'\)"):
        jax.jit(spread).lower(PARAMS, tx.init(PARAMS), X)


def test_rectangles_split_over_devices():
    """FSDP in tiles: the state lies as the rectangles do; masks equal, parameters to rounding."""
    whole = {"kernel": jax.random.normal(jax.random.key(1), (128, 256)) / 11}
    x = jax.random.normal(jax.random.key(2), (16, 128))
    tx = make(
        optax.adam(0.01),
        structure=dstee.structures.tiles((16, 32)),
        packed=True,
        selection="sharded",
        sparsity=0.75,
        every=2,
    )
    state = jax.eval_shape(tx.init, whole)
    shapes = jax.eval_shape(lambda p, s: dstee.to_tiles(p, dstee.tiles(s, p)), whole, state)
    split = {"kernel": NamedSharding(MESH, P(None, "data", None))}
    rectangles = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, split
    )
    places = dstee.state_shardings(state, rectangles)
    moment = places.inner_state[0].mu["kernel"]
    assert moment.spec == split["kernel"].spec

    def step(params, state, x, dense):
        tiles = dstee.tiles(state, whole)
        if dense:
            params, tiles = dstee.to_dense(params, tiles), dstee.no_tiles(tiles)
        grads = jax.grad(
            lambda p: jnp.mean(jnp.tanh(dstee.matmul(x, p["kernel"], tiles["kernel"])) ** 2)
        )(params)
        params, state = dstee.apply(tx, grads, state, params, mask_step=dense)
        return dstee.to_tiles(params, dstee.tiles(state, whole)) if dense else params, state

    def trained(place, **options):
        program = jax.jit(step, static_argnums=3, **options)
        state = tx.init(whole)
        params = dstee.to_tiles(dstee.apply_masks(whole, state), dstee.tiles(state, whole))
        params, state = place((params, state))
        for i in range(1, 5):
            params, state = program(params, state, x, i in dstee.dense_steps_of(tx))
        return dstee.to_dense(params, dstee.tiles(state, whole)), state

    expected, expected_state = trained(lambda held: held)
    new, state = trained(
        lambda held: jax.device_put(held, (split, places)), out_shardings=(split, places)
    )
    assert state.inner_state[0].mu["kernel"].sharding.spec == split["kernel"].spec
    equal(state.masks, expected_state.masks)
    close(new, expected)
