"""Packed state, the fused step, parts, big and many leaves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import plans, scores
from dstee_jax.engine import packing, rows
from dstee_jax.masks.random import random_mask
from dstee_jax.selection import bisection
from dstee_jax.trees import expanded
from tests import oracle

KEY = jax.random.key(0)
SHAPES = {"a": {"kernel": (16, 24)}, "b": {"kernel": (3, 4, 5)}, "bias": (24,)}


def tree(seed, shapes=SHAPES, dtype=jnp.float32):
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, leaves, strict=True)]
    return treedef.unflatten(draws)


def make(inner=None, **options):
    settings = {"sparsity": 0.75, "total_steps": 20, "every": 3} | options
    return dstee.transform(inner or optax.sgd(0.1, momentum=0.9), key=KEY, **settings)


@functools.partial(jax.jit, static_argnums=0)
def by_update(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, steps=7, how=by_update, jit=jax.jit):
    """Steps with gradients that depend on the parameters; the path, for moments, too."""
    state = tx.init(params)
    params = dstee.apply_masks(params, state)

    @jit
    def step(params, state, noise):
        grads = jax.tree.map(lambda g, p: g + (0.1 * p).astype(g.dtype), noise, params)
        return how(tx, grads, state, params)

    shapes = jax.tree.map(jnp.shape, params)
    for i in range(steps):
        noise = jax.tree.map(lambda n, p: n.astype(p.dtype), tree(100 + i, shapes), params)
        params, state = step(params, state, noise)
    return params, state


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.float32(x), np.float32(y), **tolerance), a, b
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def matrices_only(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


INNERS = {
    "adamw, matrices": optax.adamw(1e-2, mask=matrices_only),
    "clipped nesterov": optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adagrad": optax.adagrad(0.1),  # whose state does not start at zero
    "injected": optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(1e-2, 20)),
}


@pytest.mark.parametrize("name", INNERS)
def test_packed_is_the_plain_path(name):
    params = tree(0)
    plain, plain_state = train(make(INNERS[name]), params)
    for update_weights in (False,) if name != "adagrad" else (False, True):
        tx = make(INNERS[name], packed=True, update_weights=update_weights)
        if update_weights:
            plain, plain_state = train(make(INNERS[name], update_weights=True), params)
        for how in (by_update, dstee.apply):
            new, state = train(tx, params, how=how)
            close(new, plain)
            equal(state.masks, plain_state.masks)
            equal(state.counters, plain_state.counters)


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adamw(1e-2)])
def test_bit_for_bit(inner):
    """Without LLVM's optimisations, as all of this file runs.

    With them, XLA on CPU contracts a product and a sum to one rounding in one program and not in
    another, and the last bit differs.
    """
    plain, _ = train(make(inner), tree(0))
    for how in (by_update, dstee.apply):
        equal(train(make(inner, packed=True), tree(0), how=how)[0], plain)


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"packed": True, "grow_batches": 2}])
def test_two_programs(options):
    """One of them without mask steps, by a static argument: as one, floats but for rounding."""
    rounds = dstee.mask_steps(20, every=3)
    assert list(rounds) == [3, 6, 9, 12, 15]
    expected, expected_state = train(make(**options), tree(0), steps=16, how=dstee.apply)
    tx = make(**options)
    params, state = tree(0), tx.init(tree(0))
    params = dstee.apply_masks(params, state)

    @functools.partial(jax.jit, static_argnames="mask_step")
    def step(params, state, noise, mask_step):
        grads = jax.tree.map(lambda g, p: g + 0.1 * p, noise, params)
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    for i in range(16):
        params, state = step(params, state, tree(100 + i), mask_step=i + 1 in rounds)
    equal((state.masks, state.counters), expected_state[2:4])
    close(params, expected)
    programs = [
        step.lower(params, state, tree(0), mask_step=due).as_text() for due in (False, True)
    ]
    assert ["while" in program for program in programs] == [False, True]


@pytest.mark.parametrize(("donated", "copies"), [((0, 1), False), ((), True)])
def test_an_ordinary_step_copies_nothing(donated, copies):
    """By the compiled program, outside its loops: arrays of more than one entry; if donated."""
    tx, params = make(optax.adamw(1e-2), packed=True), {"kernel": tree(0)["a"]["kernel"]}
    args = params, tx.init(params), params
    step = jax.jit(lambda p, s, g: dstee.apply(tx, g, s, p), donate_argnums=donated)
    assert (copied(step.lower(*args).compile()) > 0) == copies


def copied(program):
    """How many arrays of more than one entry a program copies, outside its loops."""
    entry = program.as_text().split("ENTRY")[1]
    sizes = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", entry)
    return sum(bool(re.search(r"[2-9]|\d\d", size)) for size in sizes)


@pytest.mark.parametrize("mask_step", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(1e-2),
        optax.lion(1e-3),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    ],
)
def test_an_ordinary_step_of_whole_leaves_copies_what_the_optimizer_does(inner, mask_step):
    """Nothing, but with lion, which reads a moment after it is made anew."""
    tx = make(inner)
    params = {"kernel": jax.random.normal(KEY, (64, 96)), "other": {"kernel": jnp.ones((96, 7))}}

    def step(params, state, grads):
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    def dense(params, state, grads):
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    ours, theirs = (
        jax.jit(f, donate_argnums=(0, 1)).lower(params, state, params).compile()
        for f, state in ((step, tx.init(params)), (dense, inner.init(params)))
    )
    assert copied(ours) <= copied(theirs)
    if not mask_step:  # a masked gradient with two readers is not written out for them
        assert temporaries(ours) <= temporaries(theirs) + 1024


def temporaries(program):
    """In bytes."""
    return program.memory_analysis().temp_size_in_bytes


def test_a_promise_that_there_is_no_mask_step():
    """mask_step=False reaches transform through a chain; a mask step is left out."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), make(packed=True, every=1, update_weights=True)
    )
    params, state = tree(0), tx.init(tree(0))
    params = dstee.apply_masks(params, state)
    moved, still = (
        dstee.get_state(dstee.apply(tx, tree(1), state, params, mask_step=due)[1])
        for due in (True, False)
    )
    assert (moved.masks["a"]["kernel"] != still.masks["a"]["kernel"]).any()
    equal(still.masks, dstee.get_state(state).masks)
    for wrong in (1, "yes"):
        with pytest.raises(ValueError, match=f"mask_step={wrong} must be True or False"):
            dstee.apply(tx, tree(1), state, params, mask_step=wrong)
    with pytest.raises(ValueError, match="a static argument of jit"):
        jax.jit(lambda due: tx.update(tree(1), state, params, mask_step=due))(True)


@pytest.mark.parametrize("options", [{"indices": True}, {"packed": True}])
@pytest.mark.parametrize("chained", [False, True])
def test_apply_is_the_two_calls(options, chained):
    """Also with an optimizer whose first step makes the moments of bfloat16 weights float32."""
    tx = make(optax.adamw(1e-2), **options)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx) if chained else tx

    def with_float32(how, tx, grads, *rest):
        return how(tx, jax.tree.map(jnp.float32, grads), *rest)

    (two, two_state), (one, state) = (
        train(tx, tree(0, dtype=jnp.bfloat16), how=functools.partial(with_float32, how))
        for how in (by_update, dstee.apply)
    )
    close(one, two, rtol=0.02)
    equal(*(dstee.get_state(s).masks["a"]["kernel"] for s in (state, two_state)))
    assert one["a"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1, 31, 32, 33, 700])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_positions_and_ranks_against_numpy(size, density):
    mask = np.random.default_rng(size).random(size) < density
    mask[size // 2 : size // 2 + 64] &= density == 1  # words without a one
    where = np.flatnonzero(mask)
    equal(rows.positions(jnp.array(mask), len(where)), where)
    equal(rows.rank(jnp.array(mask), jnp.arange(size, dtype=jnp.uint32)), np.cumsum(mask) - mask)


def test_moments_follow_their_weights():
    """By NumPy: the momentum of a weight that stays active is what the plain rule makes it."""
    params, tx = tree(0), make(packed=True)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    w, mask = (np.asarray(t["a"]["kernel"]) for t in (params, state.masks))
    momentum = np.zeros_like(w)
    for i in range(1, 8):
        grads = tree(200 + i)
        params, state = by_update(tx, grads, state, params)
        new = np.asarray(state.masks["a"]["kernel"])
        if i % 3:
            momentum = np.where(mask, 0.9 * momentum + np.asarray(grads["a"]["kernel"]), 0)
            w = w - np.float32(0.1) * momentum
        else:
            assert (new != mask).any()
            momentum = np.where(mask & new, momentum, 0)
            w = np.where(mask & new, w, 0)
        mask = new
        kept = np.asarray(state.inner_state[0].trace["a"]["kernel"])
        np.testing.assert_allclose(kept, momentum[mask][None], rtol=1e-5)
        np.testing.assert_array_equal(
            state.indices["a"]["kernel"], np.flatnonzero(mask)[None, None]
        )
        np.testing.assert_allclose(params["a"]["kernel"], w, atol=1e-5)


def test_sizes():
    params = {"kernel": jax.ShapeDtypeStruct((1000, 2000), jnp.float32)}
    state = jax.eval_shape(make(optax.adamw(1e-3), sparsity=0.95, packed=True).init, params)
    moments = sum(x.size * 4 for x in jax.tree.leaves(state.inner_state[0]))
    assert moments <= 0.06 * 2 * 4 * 2_000_000
    assert state.indices["kernel"].size == 100_000
    assert state.indices["kernel"].dtype == jnp.uint32


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.adafactor(1e-3, min_dim_size_to_factor=2), r"keeps .*v_row.* of shape"),
        (optax.contrib.muon(1e-3), r"keeps .*ns_coeffs of shape"),
        (optax.sm3(1e-3), r"keeps .* of shape"),
        (optax.lbfgs(1e-3, linesearch=None), r"keeps .* of shape"),
    ],
)
def test_optimizers_that_do_not_fit(inner, message):
    with pytest.raises(ValueError, match=message + r"(.|\n)*leave packed=True out"):
        make(inner, packed=True).init(tree(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": None, "packed": True}, "give an optimizer"),
        ({"plan": dstee.plans.below_zero(), "indices": True}, "a plan that exchanges"),
        ({"grow_batches": 0}, "grow_batches=0 must be"),
        ({"grow_batches": 2, "every": None}, "there is no round"),
        ({"grow_batches": 4}, "grow_batches=4 is more than the 3 steps"),
        ({"blocks": lambda path, leaf: (5, 1)}, r"\(5, 1\) for a/kernel of shape \(16, 24\)"),
        ({"stack_axes": lambda path, leaf: (3,)}, r"gives \(3,\) for a/kernel"),
        ({"blocks": lambda path, leaf: (2, 2), "plan": dstee.plans.below_zero()}, "keeps its"),
        (
            {
                "blocks": lambda path, leaf: (2,) * leaf.ndim,
                "structure": dstee.structures.constant_fan_in(),
            },
            "leave blocks= out",
        ),
    ],
)
def test_bad_input(options, message):
    inner = options.pop("inner", optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        dstee.transform(
            inner, **{"sparsity": 0.75, "total_steps": 20, "every": 3, "key": KEY} | options
        ).init({"a": {"kernel": jnp.ones((16, 24))}})


def test_packed_needs_equal_counts_of_layers():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0], mask[1, :2] = True, True
    tx = make(
        sparsity=None, masks={"kernel": mask}, packed=True, stack_axes=lambda path, leaf: (0,)
    )
    with pytest.raises(ValueError, match=r"have \[4 8\] active weights"):
        tx.init({"kernel": jnp.ones((2, 4, 4))})


def test_apply_where_another_link_needs_whole_updates():
    params = tree(0)
    tx = optax.apply_if_finite(make(packed=True), 3)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    close(dstee.apply(tx, tree(1), state, params)[0], by_update(tx, tree(1), state, params)[0])


def test_apply_of_another_optimizer():
    tx, params = optax.adam(1e-3), tree(0)
    args = tx, tree(1), tx.init(params), params
    close(dstee.apply(*args)[0], by_update(*args)[0])


# ---------------------------------------------------------------------------- parts of a leaf


def stacked(path, leaf):
    return (0,) if leaf.ndim == 3 else ()


def apart(x):
    return {str(i): {"kernel": layer} for i, layer in enumerate(x["kernel"])}


@pytest.mark.parametrize("grow", [scores.gradient(), scores.acquisition(normalize=True)])
def test_a_stacked_leaf_is_its_layers(grow):
    params = {"kernel": jax.random.normal(KEY, (3, 12, 20))}
    options = {"grow": grow, "total_steps": 20, "every": 3}
    one = make(sparsity=0.8, stack_axes=stacked, **options)
    masks = one.init(params).masks
    many = make(sparsity=None, masks=apart(masks), **options)
    counts = [
        leaf.size
        for leaf in jax.tree.leaves(make(sparsity=0.8, packed=True).init(apart(params)).indices)
    ]
    assert [int(m.sum()) for m in masks["kernel"]] == counts  # ERK of the unstacked shapes
    states = one.init(params), many.init(apart(params))
    params = dstee.apply_masks(params, states[0])
    layers = apart(params)
    for i in range(1, 10):
        grads = {"kernel": jax.random.normal(jax.random.key(i), (3, 12, 20))}
        params, state = by_update(one, grads, states[0], params)
        layers, state_ = by_update(many, apart(grads), states[1], layers)
        states = state, state_
        equal(apart(state.masks), state_.masks)
    close(apart(params), layers)


def test_layers_of_a_stacked_leaf_keep_their_counts_under_a_structure():
    params = {"kernel": jax.random.normal(KEY, (2, 12, 20))}
    for structure in (dstee.structures.constant_fan_in(), dstee.structures.tiles((2, 2))):
        tx = make(stack_axes=stacked, structure=structure, grow=scores.random(), sparsity=0.5)
        first = tx.init(params).masks["kernel"]
        _, state = train(tx, params)
        last = state.masks["kernel"]
        assert (first != last).any()
        equal(last.sum((1, 2)), first.sum((1, 2)))
        full = expanded(last, (2, 12, 20))
        assert all(structure.fits(np.asarray(layer)) for layer in full)


def test_blocks_keep_their_counts():
    params = {"kernel": jax.random.normal(KEY, (8, 12))}
    tx = make(blocks=lambda path, leaf: (4, 2), grow=scores.random(), selection="top_k")
    _, state = train(tx, params)
    by_block = state.masks["kernel"].reshape(4, 2, 2, 6).sum((1, 3))
    equal(by_block, np.full((4, 2), 3))
    _, same = train(make(blocks=lambda path, leaf: (4, 2), grow=scores.random()), params)
    equal(state.masks, same.masks)


def test_leaves_that_are_alike_share_a_program(monkeypatch):
    params = {
        f"layer{i}": {"kernel": jax.random.normal(jax.random.key(i), (9, 7))} for i in range(9)
    }
    masks = []
    for start in (2, 100):
        monkeypatch.setattr("dstee_jax.engine.alike.STACK_FROM", start)
        masks.append(train(make(), params)[1].masks)
    equal(*masks)


@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_leaves_that_are_alike_for_many_seeds(how, monkeypatch):
    """Under vmap, and under shard_map with a seed on each device, as each seed alone."""
    monkeypatch.setattr("dstee_jax.engine.alike.STACK_FROM", 2)
    shapes = {f"layer{i}": {"kernel": (16, 8)} for i in range(3)}
    tx = make(every=2, total_steps=10)
    params = [tree(seed, shapes) for seed in range(8)]
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    many = stack(*params), stack(*map(tx.init, params))

    def masks(params, state):
        def step(count, carry):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(p * 1000 + count), params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 6, step, (params, state))[1].masks

    def one_of_each(*trees):
        first, back = (
            functools.partial(jax.tree.map, f) for f in (lambda x: x[0], lambda x: x[None])
        )
        return back(masks(*first(trees)))

    if how == "shard_map":
        mesh = jax.make_mesh((8,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
        place = jax.sharding.PartitionSpec("seed")
        got = jax.jit(jax.shard_map(one_of_each, mesh=mesh, in_specs=place, out_specs=place))(*many)
    else:
        got = jax.jit(jax.vmap(masks))(*many)
    monkeypatch.setattr("dstee_jax.engine.alike.STACK_FROM", 100)
    alone = jax.jit(masks)
    equal(got, stack(*(alone(p, tx.init(p)) for p in params)))


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"plan": plans.below_zero()}])
def test_keys_are_searched_in_groups(options, monkeypatch):
    """Whatever number of leaves is searched at once, the masks are the same."""
    masks = []
    for limit, cached in ((2**30, 2**30), (2000, 2000), (2**30, 2000), (1, 1)):
        monkeypatch.setattr("dstee_jax.engine.round.KEYS_AT_ONCE", limit)
        monkeypatch.setattr("dstee_jax.selection.bisection.CACHED", cached)
        params, state = train(make(selection="bisection", **options), tree(0))
        masks.append((params, state.masks, state.counters))
    for other in masks[1:]:
        equal(masks[0], other)


def test_a_transformer_of_200_leaves_has_few_programs():
    """Leaves of one role are one loop each: without it there would be loops for each leaf."""
    params = {
        f"layer{i}": {
            name: {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)} for name in "qkvoudg"
        }
        for i in range(28)
    }
    tx = make(optax.adamw(1e-3), total_steps=1000, every=100)
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, state, params).as_text()
    assert text.count("stablehlo.while") <= 3 * 7 * 3


def test_memory_of_a_stacked_leaf_is_kept_by_layer():
    scale = jnp.array([1.0, 10.0, 100.0])[:, None, None]
    params = {"kernel": jax.random.normal(KEY, (3, 8, 12)) * scale}
    tx = make(stack_axes=stacked, memory=dstee.memory.admm(1, 10, 1))
    _, state = tx.update(params, tx.init(params), params)
    z = state.rule_state.memory["kernel"][0]
    equal((z != 0).sum((1, 2)), state.masks["kernel"].sum((1, 2)))


def test_given_masks_of_stacked_layers_have_the_structure_each():
    mask = np.zeros((2, 12, 4), bool)
    for layer, fan_in in enumerate(([3, 5, 3, 5], [5, 3, 5, 3])):
        for unit, n in enumerate(fan_in):
            mask[layer, :n, unit] = True
    options = {"stack_axes": stacked, "structure": dstee.structures.constant_fan_in()}
    tx = make(sparsity=None, masks={"kernel": mask}, **options)
    with pytest.raises(ValueError, match="kernel does not have the structure"):
        tx.init({"kernel": jnp.ones((2, 12, 4))})


def test_leaves_that_stay_dense_need_no_parts():
    params = {"kernel": jnp.ones((16, 24)), "embedding": jnp.ones((5, 3)), "scale": 1.0}
    state = make(blocks=lambda path, leaf: (8, 1)).init(params)
    assert int(state.masks["kernel"].sum()) == 96
    big = jax.ShapeDtypeStruct((2**20, 2**13), jnp.bfloat16)
    jax.eval_shape(make().init, {"kernel": jnp.ones((16, 24)), "embedding": big})


# ---------------------------------------------------------------------------- gradients


def test_growth_score_from_several_gradients():
    params = {"kernel": jax.random.normal(KEY, (16, 24))}
    tx = make(optax.sgd(0.01), grow=scores.gradient(), grow_batches=3, every=5)
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    seen, mask = [], np.asarray(state.masks["kernel"])
    for i in range(1, 11):
        assert bool(state.needs_dense) == (i % 5 in (3, 4, 0))
        grads = {"kernel": jax.random.normal(jax.random.key(i), (16, 24))}
        seen.append(np.asarray(grads["kernel"]))
        if i % 5 == 0:
            k = int((mask & ~np.asarray(tx.update(grads, state, params)[1].masks["kernel"])).sum())
            score = np.abs(sum(np.float32(g) for g in seen[-3:]) / np.float32(3))
            mask = oracle.drop_and_grow(mask, np.abs(np.asarray(params["kernel"])), score, k, False)
        params, state = by_update(tx, grads, state, params)
        equal(state.masks["kernel"], mask)


def test_gradients_are_summed_in_float32_and_asked_for():
    params = {"kernel": jnp.ones((16, 24), jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        state = make(grow_batches=2).init(params)
        assert state.rule_state.gradients["kernel"].dtype == jnp.float32
        make(grow_batches=2).update(params, state, params)
    tx = dstee.transform(sparsity=0.75, total_steps=20, every=3, key=KEY, grow_batches=2)
    with pytest.raises(ValueError, match=r"grow_batches=2 sums gradients: .*grad=grads"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("packed_", [False, True])
def test_bfloat16(packed_):
    params = tree(0, dtype=jnp.bfloat16)
    tx = make(optax.adamw(1e-2, mu_dtype=jnp.bfloat16), packed=packed_)
    new, state = train(tx, params)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    inactive = jax.tree.map(lambda p, m: np.asarray(p)[~np.asarray(m)], new["a"], state.masks["a"])
    assert not np.any(np.float32(inactive["kernel"]))
    close(new, train(make(optax.adamw(1e-2, mu_dtype=jnp.bfloat16)), params)[0], rtol=0.05)


# ---------------------------------------------------------------------------- big arrays


@pytest.mark.parametrize("size", [255, 254, 200])
def test_index_arithmetic_with_a_narrow_type(size, monkeypatch):
    """8-bit counts and indices: arrays of up to 255 entries, as 32 bits are for 2**32 - 1."""
    rng = np.random.default_rng(0)
    for shape in ((size,), (5, size // 5)):
        n = int(np.prod(shape))
        mask = rng.random(shape) < 0.5
        score = rng.integers(0, 3, shape).astype(np.float32)  # ties everywhere
        expected = oracle.drop_and_grow(mask, score, score, 9, False)
        for module in (bisection, rows):
            monkeypatch.setattr(module, "INDEX", jnp.uint8)
        monkeypatch.setattr("dstee_jax.selection.exchange.INDEX", jnp.uint8)
        monkeypatch.setattr("dstee_jax.selection.largest.INDEX", jnp.uint8)
        monkeypatch.setattr("dstee_jax.masks.random.INDEX", jnp.uint8)
        new = dstee.drop_and_grow.__wrapped__(
            jnp.array(mask), score, score, 9, k_max=9, selection="bisection"
        )
        equal(new, expected)
        full = random_mask(KEY, shape, n - 1)
        assert int(full.sum(dtype=jnp.int32)) == n - 1
        found = packing.positions(full, n - 1, (1,) * len(shape))
        equal(np.sort(np.asarray(found).ravel()), np.flatnonzero(full))
        equal(
            packing.Entries(found).take(jnp.arange(n).reshape(shape)).ravel(), np.flatnonzero(full)
        )


def test_more_than_two_to_the_31_entries_compile():
    params = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15 + 8), jnp.bfloat16)}
    tx = make(optax.sgd(0.1, momentum=0.9), sparsity=0.99, packed=True, total_steps=100, every=10)
    state = jax.eval_shape(tx.init, params)
    assert abs(state.indices["kernel"].size - 0.01 * 2**16 * (2**15 + 8)) < 2
    compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    assert compiled.memory_analysis().output_size_in_bytes > 2**31


def test_more_than_two_to_the_32_entries_are_refused_with_the_remedy():
    params = {"kernel": jax.ShapeDtypeStruct((4, 2**16, 2**16), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"17,179,869,184 entries in a part.*blocks="):
        jax.eval_shape(make().init, params)
    layers = jax.eval_shape(make(blocks=lambda path, leaf: (4, 2, 1)).init, params)
    assert layers.masks["kernel"].shape == (4, 2**16, 2**16)


@pytest.mark.parametrize("structure", [None, dstee.structures.tiles((4, 4))])
def test_packed_on_a_tpu_is_for_tiles(monkeypatch, structure):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    make = functools.partial(
        dstee.transform,
        optax.sgd(0.1),
        sparsity=0.9,
        total_steps=10,
        key=jax.random.key(0),
        every=None,
        packed=True,
        structure=structure,
    )
    if structure is not None:
        make()
        return
    with pytest.warns(UserWarning, match=r"packed=True without tiles .* structure="):
        make()
