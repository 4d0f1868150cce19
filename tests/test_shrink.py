"""`shrink`: idle units go, and the network computes what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import dstee_jax as dstee

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,  # 0.5 where its input is 0
}


def network(shapes, density, seed=0, biases=True):
    """Sparse kernels and full biases, layer by layer."""
    rng = np.random.default_rng(seed)

    def layer(shape):
        kernel = rng.standard_normal(shape) * (rng.random(shape) < density)
        bias = {"bias": rng.standard_normal(shape[-1]).astype(np.float32)} if biases else {}
        return {"kernel": kernel.astype(np.float32)} | bias

    return {str(i): layer(shape) for i, shape in enumerate(shapes)}


def forward(params, x, activation, padding="SAME"):
    """By JAX alone; flattens where a kernel of two axes follows a convolution."""
    for i, layer in enumerate(params.values()):
        x = activation(x) if i else x
        if layer["kernel"].ndim == 4:
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), padding, dimension_numbers=numbers
            )
        else:
            x = x.reshape(len(x), -1) @ layer["kernel"]
        x += layer.get("bias", 0)
    return x


MLP = [(12, 40), (40, 40), (40, 40), (40, 5)]
CONVOLUTIONS = [(3, 3, 2, 24), (3, 3, 24, 24), (1, 1, 24, 24), (3, 3, 24, 4)]
FLATTENED = [(3, 3, 2, 24), (3, 3, 24, 16), (16 * 36, 20), (20, 3)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shapes", [MLP, CONVOLUTIONS, FLATTENED])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("density", [0.02, 0.004])
def test_outputs_are_equal(name, shapes, padding, density):
    activation = ACTIVATIONS[name]
    places = 10 if padding == "VALID" else 6
    if shapes is MLP:
        density, places = density * 2, None
    params = network(shapes, density)
    small = dstee.shrink(params, list(params), activation=activation, padding=padding)
    x_shape = (4, 12) if places is None else (4, places, places, 2)
    x = jax.random.normal(jax.random.key(0), x_shape)
    before = forward(params, x, activation, padding)
    after = forward(small.params, x, activation, padding)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    *hidden, last = small.units.values()
    assert last == (shapes[-1][-1], shapes[-1][-1])
    assert any(new < old for old, new in hidden)
    assert small.params["0"]["kernel"].shape[-2] == shapes[0][-2]
    for key, layer in small.params.items():
        old, new = small.units[key]
        assert layer["kernel"].shape[-1] == layer["bias"].shape[0] == new == len(small.kept[key])
        assert params[key]["kernel"].shape[-1] == old
    nothing = dstee.shrink(small.params, list(params), activation=activation, padding=padding)
    assert all(old == new for old, new in nothing.units.values())


@pytest.mark.parametrize("shapes", [MLP, CONVOLUTIONS])
def test_what_stays_has_weights_on_both_sides(shapes):
    params = network(shapes, 0.05)
    small = dstee.shrink(params, list(params), padding="VALID")
    layers = list(small.params.values())
    for name, here, after in zip(small.params, layers[:-1], layers[1:], strict=False):
        fan_in = (here["kernel"] != 0).sum(tuple(range(here["kernel"].ndim - 1)))
        fan_out = np.moveaxis(after["kernel"] != 0, -2, 0).any(
            tuple(range(1, after["kernel"].ndim))
        )
        if small.units[name][1] > 1:
            assert fan_in.all()
            assert fan_out.all()
    for name, before in (("1", "0"), ("2", "1")):
        part = params[name]["kernel"][..., small.kept[before], :][..., small.kept[name]]
        np.testing.assert_array_equal(small.params[name]["kernel"], part)


def test_a_removed_unit_empties_others():
    # 0 feeds 0 feeds 0; 1 of the first is read by 1 of the second alone, which nobody reads.
    up = {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    middle = {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    down = {"kernel": np.array([[1.0], [0.0]], np.float32)}
    small = dstee.shrink({"a": up, "b": middle, "c": down}, ["a", "b", "c"])
    assert small.units == {"a": (2, 1), "b": (2, 1), "c": (1, 1)}
    assert [kept.tolist() for kept in small.kept.values()] == [[0], [0], [0]]


def test_constants_go_through_several_layers_by_hand():
    # Unit 1 of a is relu(2) = 2; so unit 1 of b is relu(1 + 2 * 3) = 7, and c gets 0.5 + 7 * 10.
    a = {"kernel": np.array([[1.0, 0.0]]), "bias": np.array([0.0, 2.0])}
    b = {"kernel": np.array([[1.0, 0.0], [0.0, 3.0]]), "bias": np.array([0.0, 1.0])}
    c = {"kernel": np.array([[1.0], [10.0]]), "bias": np.array([0.5])}
    small = dstee.shrink({"a": a, "b": b, "c": c}, ["a", "b", "c"])
    assert small.units == {"a": (2, 1), "b": (2, 1), "c": (1, 1)}
    assert small.params["c"]["bias"].tolist() == [70.5]


def test_a_constant_stays_before_a_padded_window():
    conv = np.zeros((3, 3, 2, 2), np.float32)
    conv[..., 0] = 1
    first = {"kernel": conv, "bias": np.array([0.0, 3.0], np.float32)}
    second = {"kernel": np.ones((3, 3, 2, 4), np.float32), "bias": np.zeros(4, np.float32)}
    params = {"first": first, "second": second}
    small = dstee.shrink(params, params)
    assert small.units["first"] == (2, 2)
    assert small.constants["first"].tolist() == [1]
    # A constant that is 0 is 0 at the border, too.
    first["bias"][1] = -3
    small = dstee.shrink(params, params)
    assert small.units["first"] == (2, 1)
    assert small.constants["first"].size == 0
    # Without padding it moves: 9 places of weight 1.
    first["bias"][1] = 3
    small = dstee.shrink(params, params, padding="VALID")
    assert small.units["first"] == (2, 1)
    assert small.params["second"]["bias"].tolist() == [27.0] * 4


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_one_unit_stays(activation):
    params = network(MLP, 0.0)
    activation = ACTIVATIONS[activation]
    small = dstee.shrink(params, list(params), activation=activation)
    assert [new for _, new in small.units.values()] == [1, 1, 1, 5]
    assert [len(found) for found in small.constants.values()] == [1, 1, 1, 0]
    x = jax.random.normal(jax.random.key(0), (4, 12))
    np.testing.assert_allclose(
        forward(small.params, x, activation), forward(params, x, activation), rtol=1e-6
    )


def test_no_bias_is_needed_for_zeros():
    params = network(MLP, 0.03, biases=False)
    small = dstee.shrink(params, list(params))
    assert small.units["1"][1] < 40
    x = jax.random.normal(jax.random.key(0), (4, 12))
    after = forward(small.params, x, jax.nn.relu)
    np.testing.assert_allclose(after, forward(params, x, jax.nn.relu), rtol=1e-5, atol=1e-6)


def test_the_bias_of_units_may_be_missing():
    up = {"kernel": np.array([[1.0, 0.0]])}  # unit 1 is sigmoid(0)
    down = {"kernel": np.array([[1.0], [4.0]]), "bias": np.zeros(1)}
    small = dstee.shrink({"a": up, "b": down}, ["a", "b"], activation=jax.nn.sigmoid)
    assert small.params["b"]["bias"].tolist() == [2.0]


@pytest.mark.parametrize("as_type", [np.asarray, jnp.asarray])
def test_types_and_what_is_no_layer_of_the_chain_stay(as_type):
    dtype = jnp.bfloat16
    params = jax.tree.map(lambda x: as_type(x.astype(dtype)), network(MLP, 0.03))
    other = {"scale": object}
    small = dstee.shrink({"body": params, "other": other}, [f"body/{i}" for i in range(4)])
    assert small.params["other"] == other
    assert small.units["body/1"][1] < 40
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(small.params["body"]), strict=True):
        assert type(x) is type(y)
        assert y.dtype == dtype


def test_lists_by_number():
    layers = list(network(MLP, 0.03).values())
    small = dstee.shrink(layers, range(4))
    assert type(small.params) is list
    assert small.units["1"][1] < 40


def test_nnx_and_a_trained_state():
    class Model(nnx.Module):
        def __init__(self, width, rngs):
            self.up = nnx.Linear(16, width[0], rngs=rngs)
            self.middle = nnx.Linear(width[0], width[1], use_bias=False, rngs=rngs)
            self.down = nnx.Linear(width[1], 4, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.middle(nnx.relu(self.up(x)))))

    model = Model((64, 64), nnx.Rngs(0))
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.98, total_steps=1000, key=jax.random.key(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)
    params = dstee.apply_masks(params, optimizer.opt_state)
    small = dstee.shrink(params, ["up", "middle", "down"])
    assert all(new < old for old, new in list(small.units.values())[:2])
    x = jax.random.normal(jax.random.key(1), (4, 16))
    expected = nnx.merge(graph, params)(x)
    smaller = Model([small.units[name][1] for name in ("up", "middle")], nnx.Rngs(1))
    nnx.update(smaller, small.params)
    np.testing.assert_allclose(smaller(x), expected, rtol=1e-5, atol=1e-6)
    # On with the forms of a network without masks.
    fast = dstee.inference(nnx.to_pure_dict(small.params))
    h = np.maximum(np.asarray(x) @ fast["up"]["kernel"] + fast["up"]["bias"], 0)
    h = np.maximum(h @ fast["middle"]["kernel"], 0)
    y = h @ fast["down"]["kernel"] + fast["down"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"chain": ["0", "3"]}, r"no 3/kernel: the layers that have one are \['0', '1', '2'\]"),
        ({}, {"chain": ["0", "1/kernel"]}, "no 1/kernel/kernel"),
        ({}, {"chain": ["0"]}, r"chain=\['0'\] must name two layers or more"),
        ({}, {"chain": "0"}, r"chain=\['0'\] must name two"),
        ({}, {"chain": ["0", "1", "0"]}, "each once"),
        ({}, {"chain": ["0", "2", "1"]}, "2 has 2 outputs and 1 6 inputs: the chain must name"),
        ({"1": (9, 6)}, {}, "0 has 6 outputs and 1 9 inputs"),
        ({"1": (12, 6)}, {}, "0 has 6 outputs and 1 12 inputs"),
        ({"1": (3, 6, 6)}, {}, r"1 has a kernel of shape \(3, 6, 6\) and a bias of shape \(6,\)"),
        ({"1/bias": np.ones(5)}, {}, r"1 has a kernel of shape \(6, 6\) and a bias of shape \(5,"),
        ({"1/scale": np.ones(6)}, {}, r"1 has \['scale'\] beside kernel and bias: only plain"),
        ({"1/bias": None}, {}, r"1 units of 0 are .*, as unit 2 \(1.5\), and 1 has no bias"),
        ({}, {"activation": jnp.sum}, r"activation makes \(\) of \(6,\), the bias of 0"),
        ({}, {"padding": "CIRCULAR"}, "padding='CIRCULAR' must be 'VALID' if"),
    ],
)
def test_bad_input(change, options, message):
    params = network([(4, 6), (6, 6), (6, 2)], 1.0)
    params["0"]["kernel"][:, 2] = 0
    params["0"]["bias"][2] = 1.5
    for name, value in change.items():
        layer, _, leaf = name.partition("/")
        params[layer][leaf or "kernel"] = np.ones(value) if type(value) is tuple else value
    chain = options.pop("chain", ["0", "1", "2"])
    with pytest.raises(ValueError, match=message):
        dstee.shrink(params, chain, **options)
