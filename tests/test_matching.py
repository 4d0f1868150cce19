"""Which array of an optimizer's state belongs to which parameter: by shapes, never by names."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import dstee_jax as dstee
from dstee_jax.engine.moments import owners

FIELDS = ["mu", "nu", "trace", "count", "inner_state", "masks", "z", "head"]


def train(inner, tree, steps=12):
    """Parameters and moments after some rounds; gradients follow the order of the leaves."""
    tx = dstee.methods.rigl(
        inner, sparsity=0.8, total_steps=100, every=5, key=jax.random.key(0)
    )  # fmt: skip
    state = tx.init(tree)
    params = dstee.apply_masks(tree, state)

    @jax.jit
    def step(params, state, key):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        grads = treedef.unflatten([jax.random.normal(k, x.shape) + x for k, x in pairs])
        return dstee.apply(tx, grads, state, params)

    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return jax.tree.leaves(params), state


def layers(head):
    """A layer at the root, and one of its name and shape in a head that sorts behind it."""
    keys = jax.random.split(jax.random.key(7), 2)
    one, two = ({"Dense_0": {"w": jax.random.normal(k, (16, 16))}} for k in keys)
    return one | {head: two}


@pytest.mark.parametrize("inner", [optax.adam(1e-2), optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("head", ["mu", "nu", "trace"])
def test_a_head_named_as_a_field_of_the_state(head, inner):
    params, state = train(inner, layers(head))
    plain, of_plain = train(inner, layers("zebra"))
    for x, y in zip(params, plain, strict=True):
        np.testing.assert_array_equal(x, y)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(of_plain), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("head", ["mu", "zebra"])
def test_flattened_moments_are_adams(head):
    params, state = train(optax.flatten(optax.adam(1e-2)), layers(head))
    plain, of_plain = train(optax.adam(1e-2), layers(head))
    for x, y in zip(params, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for name in ("mu", "nu"):
        flat = getattr(state.inner_state[0], name)
        tree = jax.tree.leaves(getattr(of_plain.inner_state[0], name))
        np.testing.assert_allclose(flat, np.concatenate([x.ravel() for x in tree]), atol=1e-6)


def test_packed_refuses_flattened_moments():
    tx = dstee.transform(
        optax.flatten(optax.adam(1e-2)), sparsity=0.8, total_steps=400, key=jax.random.key(0),
        packed=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"keeps 0/mu of shape .*a parameter: leave packed=True"):
        tx.init(layers("head"))


def by_label(params):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(["a" if i % 2 else "b" for i in range(len(leaves))])


def every_other(params):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten([i % 2 == 0 for i in range(len(leaves))])


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-2),
    "masked": optax.masked(optax.adam(1e-2), every_other),
    "by label": optax.multi_transform({"a": optax.adam(1e-2), "b": optax.lion(1e-2)}, by_label),
    "injected": optax.inject_hyperparams(optax.adam)(1e-2),
}


def check(inner, params):
    """An array belongs to the parameter whose gradient, alone, makes an update change it."""
    leaves, treedef = jax.tree.flatten(params)
    state = inner.init(params)
    update = jax.jit(inner.update)

    def after(i):
        grads = [jnp.full(x.shape, float(i == j)) for j, x in enumerate(leaves)]
        return jax.tree.leaves(update(treedef.unflatten(grads), state, params)[1])

    still = after(None)
    expected = [None] * len(still)
    for i in range(len(leaves)):
        for j, (x, y) in enumerate(zip(still, after(i), strict=True)):
            if x.ndim and (x != y).any():
                assert expected[j] is None
                expected[j] = i
    assert owners(inner, params) == expected


names = st.sampled_from(FIELDS)
arrays = st.sampled_from([(4, 4), (4, 4), (4, 5), (5, 4), (4,), (1, 1)])
trees = st.recursive(
    arrays.map(np.ones),
    lambda child: st.one_of(
        st.dictionaries(names, child, min_size=1, max_size=3),
        st.lists(child, min_size=1, max_size=2),
        st.lists(child, min_size=1, max_size=2).map(tuple),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(params=trees)
def test_owners_in_random_trees(name, params):
    check(OPTIMIZERS[name], params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["bare", "FrozenDict", "NNX", "Equinox"])
def test_owners_in_containers(kind, name):
    check(OPTIMIZERS[name], container(kind))


def container(kind):
    if kind == "bare":
        return jnp.ones((4, 4))
    if kind == "FrozenDict":
        return FrozenDict(layers("mu"))
    if kind == "Equinox":
        keys = jax.random.split(jax.random.key(0), 2)
        model = {"mu": eqx.nn.Linear(4, 4, key=keys[0]), "nu": eqx.nn.Linear(4, 4, key=keys[1])}
        return eqx.filter(model, eqx.is_array)
    return nnx.state(Twins(nnx.Rngs(0)), nnx.Param)


class Twins(nnx.Module):
    def __init__(self, rngs, head="mu"):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        setattr(self, head, nnx.Dict(linear=nnx.Linear(6, 6, rngs=rngs)))


def test_nnx_optimizer_of_a_head_named_mu():
    def run(head):
        model = Twins(nnx.Rngs(0), head)
        tx = dstee.methods.rigl(
            optax.adam(1e-2), sparsity=0.6, total_steps=100, every=3, key=jax.random.key(0)
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.update(model, dstee.apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state))

        @nnx.jit
        def step(model, optimizer, x):
            def loss(m):
                return jnp.mean(getattr(m, head)["linear"](m.linear(x)) ** 2)

            optimizer.update(model, nnx.grad(loss)(model))

        for i in range(7):
            step(model, optimizer, jax.random.normal(jax.random.key(i), (8, 6)))
        return jax.tree.leaves(nnx.state(model, nnx.Param))

    for x, y in zip(run("mu"), run("nu"), strict=True):
        np.testing.assert_array_equal(x, y)
