"""Arrays chosen by their bits: as `jnp.where`, in values and in derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dstee_jax.engine.bits import either

SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -1.5, 3.0]


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn"])
def test_either_is_where_bit_by_bit(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.array(SPECIAL * 8, dtype)
        other = jnp.array(np.repeat(SPECIAL, 8), dtype)
        mask = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        got, want = jax.jit(either)(mask, x, other), jnp.where(mask, x, other)
        assert got.dtype == want.dtype == dtype
        np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool", "float4_e2m1fn"])
def test_other_types_are_where(dtype):
    x, other = jnp.arange(6).astype(dtype), jnp.ones(6, dtype)
    mask = jnp.arange(6) % 2 == 0
    np.testing.assert_array_equal(either(mask, x, other), jnp.where(mask, x, other))


def test_64_bits_are_left_to_where():
    """XLA's TPU compiler has no conversion of their bits to integers of a sign."""
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float64)
        assert "bitcast" not in str(jax.make_jaxpr(either)(x > 0, x, x))


def test_a_mask_of_tiles_stands_for_its_weights():
    x = jnp.arange(1.0, 17.0).reshape(4, 4)
    got = either(jnp.array([[True, False], [False, True]]), x, jnp.zeros_like(x))
    np.testing.assert_array_equal(got, x * np.kron(np.eye(2), np.ones((2, 2))))


def test_either_has_the_derivatives_of_where():
    mask, x, other = jnp.array([True, False, True]), jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 5.0)

    def cubes(of):
        return lambda x, other: (of(mask, x, other) ** 3).sum()

    for derivative in (jax.grad, jax.hessian, jax.jacfwd):
        got, want = (derivative(cubes(of), argnums=(0, 1))(x, other) for of in (either, jnp.where))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    masks = jnp.stack([mask, ~mask])
    got = jax.vmap(either, in_axes=(0, None, None))(masks, x, other)
    np.testing.assert_array_equal(got, jnp.where(masks, x, other))
