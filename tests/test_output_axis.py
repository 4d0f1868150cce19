"""Kernels (..., in, out), as Flax has them, and (out, in, ...), as Equinox: the same results."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import at_init, scores, structures
from dstee_jax.rules import units

KEY = jax.random.key(0)
SHAPES = {"conv": (3, 3, 8, 16), "dense": (20, 12)}


def turned(kernel):
    """(h, w, in, out) as (out, in, h, w), and (in, out) as (out, in)."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def draw(seed):
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {name: {"kernel": jax.random.normal(keys[name], SHAPES[name])} for name in SHAPES}


def turn(tree):
    return jax.tree.map(turned, tree)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("here", "there", "sparsity"),
    [
        (structures.constant_fan_in(), structures.constant_fan_in(output_axis=0), 0.8),
        (structures.n_m(2, 4), structures.n_m(2, 4, axis=1), 0.5),
    ],
)
def test_structures_of_turned_kernels(here, there, sparsity):
    params = draw(0)
    masks = {
        name: {"kernel": here.random_mask(KEY, shape, here.count(shape, wanted))}
        for name, shape in SHAPES.items()
        for wanted in [round((1 - sparsity) * np.prod(shape))]
    }

    def train(structure, convert):
        weights, moves = convert(params), []
        tx = dstee.transform(
            optax.sgd(0.1),
            masks=convert(masks),
            structure=structure,
            grow=scores.gradient(),
            total_steps=20,
            every=4,
            key=KEY,
        )
        state, update = tx.init(weights), jax.jit(tx.update)
        weights = dstee.apply_masks(weights, state)
        for step in range(12):
            updates, state = update(convert(draw(step + 1)), state, weights)
            weights = optax.apply_updates(weights, updates)
            moves.append(state.masks)
        return weights, moves

    ours, theirs = train(here, lambda tree: tree), train(there, turn)
    equal(turn(ours[1]), theirs[1])
    equal(turn(ours[0]), theirs[0])
    assert (ours[1][-1]["dense"]["kernel"] != masks["dense"]["kernel"]).any()


def test_first_masks_have_a_constant_fan_in():
    for shape, axis in (((16, 8, 3, 3), 0), ((12, 20), 0), ((5, 12, 20), 1), ((3, 3, 8, 16), -1)):
        structure = structures.constant_fan_in(output_axis=axis)
        count = structure.count(shape, 100)
        mask = np.asarray(structure.random_mask(KEY, shape, count))
        rest = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        assert mask.shape == shape
        assert mask.sum() == count
        assert set(mask.sum(rest)) == {count // shape[axis]}
        assert structure.fits(mask)
        assert not structure.fits(mask ^ (np.arange(mask.size).reshape(shape) == 0))


def test_columns_there_and_back():
    for shape in SHAPES.values():
        x = jnp.arange(np.prod(shape)).reshape(shape)
        for axis in range(-len(shape), len(shape)):
            columns = np.moveaxis(np.asarray(x), axis, 0).reshape(x.shape[axis], -1)
            assert columns.shape == (shape[axis], x.size // shape[axis])
            np.testing.assert_array_equal(columns[1], jnp.take(x, 1, axis).ravel())
            np.testing.assert_array_equal(units.from_columns(columns, shape, axis), x)


def test_rescale_of_turned_kernels():
    params = draw(0)
    masks = dstee.init_masks(params, 0.9, KEY)
    scaled = dstee.rescale(params, masks, per_unit=True)
    equal(turn(scaled), dstee.rescale(turn(params), turn(masks), per_unit=True, output_axis=0))
    mask, weight = masks["dense"]["kernel"], params["dense"]["kernel"]
    unit = int(mask.sum(0).argmax())
    factor = np.sqrt(20 / int(mask[:, unit].sum()))
    np.testing.assert_allclose(
        scaled["dense"]["kernel"][:, unit], mask[:, unit] * weight[:, unit] * factor, rtol=1e-6
    )
    equal(turn(dstee.rescale(params, masks)), dstee.rescale(turn(params), turn(masks)))


def test_empty_units_of_turned_kernels():
    mask = jnp.zeros((3, 3, 2, 5), bool).at[0, 1, 0, 3].set(True).at[2, 2, 1, 0].set(True)
    assert int(dstee.empty_units(mask)) == int(dstee.empty_units(turned(mask), output_axis=0)) == 3
    assert int(dstee.empty_units(jnp.array(False))) == 1
    lines = []
    for m, axis in ((mask, -1), (turned(mask), 0)):
        tx = dstee.transform(masks={"kernel": m}, total_steps=200, key=KEY)
        state = tx.init({"kernel": jnp.ones(m.shape)})
        lines.append(dstee.summary(state, output_axis=axis).splitlines()[1].split())
    assert "3/5" in lines[0]
    assert lines[0][2:] == lines[1][2:]


def test_synflow_of_turned_kernels_does_not_underflow():
    """Kernels of 64 outputs and 1 x 1 windows: 30 layers of flow, to be kept within float32."""
    keys = jax.random.split(KEY, 30)
    ours = {f"{i:02}": jax.random.normal(key, (1, 1, 64, 64)) for i, key in enumerate(keys)}
    theirs = turn(ours)

    def network(params, x):
        for kernel in params.values():
            x = x @ kernel[0, 0]
        return x

    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    options = {"sparsity": 0.5, "rounds": 3}

    def there(params, x):
        return network(jax.tree.map(lambda kernel: kernel.transpose(2, 3, 1, 0), params), x)

    masks = at_init.synflow(network, ours, x, **options)
    equal(turn(masks), at_init.synflow(there, theirs, x, **options, output_axis=0))


def test_an_equinox_model_keeps_its_fan_ins():
    keys = jax.random.split(KEY, 2)
    model = [eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.MLP(16, 4, 32, 1, key=keys[1])]
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = dstee.methods.rigl(
        optax.adam(1e-2),
        structure=structures.constant_fan_in(output_axis=0),
        sparsity=0.8,
        total_steps=40,
        every=5,
        key=KEY,
    )
    state, update = tx.init(params), jax.jit(tx.update)
    params = dstee.apply_masks(params, state)
    first = state.masks
    for step in range(10):
        grads = jax.tree.map(
            lambda p, s=step: jax.random.normal(jax.random.key(s), p.shape), params
        )
        updates, state = update(grads, state, params)
        params = eqx.apply_updates(params, updates)
    masks = jax.tree.leaves(state.masks)
    assert len(masks) == 3
    assert any((a != b).any() for a, b in zip(masks, jax.tree.leaves(first), strict=True))
    for mask in masks:
        assert len(set(mask.reshape(mask.shape[0], -1).sum(1).tolist())) == 1
    total = dstee.summary(state, params, output_axis=0).splitlines()[4].split()
    assert total[0] == "total"
    assert "0/44" in total  # 8 filters, 32 + 4 units, all fed


@pytest.mark.parametrize(
    "call",
    [
        lambda: structures.constant_fan_in(output_axis=2).count((4, 5), 10),
        lambda: structures.constant_fan_in(output_axis=-3).fits(np.ones((4, 5), bool)),
        lambda: dstee.empty_units(jnp.ones((4, 5), bool), output_axis=2),
        lambda: dstee.rescale(
            {"w": jnp.ones((4, 5))}, {"w": jnp.ones((4, 5), bool)}, per_unit=True, output_axis=2
        ),
    ],
)
def test_an_axis_that_is_none(call):
    with pytest.raises(ValueError, match=r"output_axis=.* is no axis of shape \(4, 5\): pass -1"):
        call()


def test_groups_along_an_axis_that_is_none():
    structure = structures.n_m(2, 4, axis=2)
    assert not structure.fits(np.ones((4, 4), bool))
    with pytest.raises(ValueError, match=r"2:4 needs axis 2 of shape \(4, 4\)"):
        structure.count((4, 4), 8)
