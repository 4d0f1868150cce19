"""Gradients that do not fit their parameters are refused, with the leaf and both shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee

PARAMS = {"layer": {"kernel": jnp.ones((8, 4))}, "bias": jnp.ones(4)}
BY_EXAMPLE = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), PARAMS)
SHAPES = r"of bias has shape \(2, 4\), the parameter \(4,\): average gradients"


def make(inner=None, **options):
    settings = {"sparsity": 0.5, "total_steps": 40, "every": 3, "key": jax.random.key(0)} | options
    return dstee.transform(inner, **settings)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask_step", [False, True])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_a_gradient_of_each_example(jit, mask_step, packed):
    tx = make(optax.sgd(0.1), packed=packed)
    state = tx.init(PARAMS)
    for step in (
        lambda g: tx.update(g, state, PARAMS, mask_step=mask_step),
        lambda g: dstee.apply(tx, g, state, PARAMS, mask_step=mask_step),
    ):
        with pytest.raises(ValueError, match=f"grads {SHAPES}"):
            jit(step)(BY_EXAMPLE)


def test_a_raw_gradient_of_each_example():
    tx = optax.chain(optax.sgd(0.1), make())
    with pytest.raises(ValueError, match=f"grad= {SHAPES}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad=BY_EXAMPLE)


def test_a_gradient_that_nobody_averaged_over_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    tx = make(optax.sgd(0.1))
    state = tx.init(PARAMS)

    def step(grads, state, params):
        return dstee.apply(tx, grads, state, params)

    spread = jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P())
    with pytest.raises(ValueError, match=r"grads of bias has shape \(1, 4\)"):
        jax.jit(spread)(BY_EXAMPLE, state, PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool, jax.dtypes.float0])
def test_gradients_that_are_not_real(dtype):
    tx = make(optax.sgd(0.1))
    grads = jax.tree.map(lambda x: np.zeros(x.shape, dtype), PARAMS)
    with pytest.raises(ValueError, match=rf"grads of bias has dtype .*{np.dtype(dtype).name}"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_gradients_of_fewer_leaves():
    tx = make(optax.sgd(0.1))
    with pytest.raises(ValueError, match="grads and params have different structures"):
        tx.update(PARAMS | {"bias": None}, tx.init(PARAMS), PARAMS)
