"""`tiles_pay`: it measures both forms of the layer that was asked for, and refuses what is none."""

import jax
import jax.numpy as jnp
import pytest

import dstee_jax as dstee
from dstee_jax.tiling import pays

CASES = {
    "layer": ((8, 32), (32, 16), {}),
    "tokens": ((2, 4, 32), (32, 16), {}),
    "bfloat16": ((8, 32), (32, 16), {}),
    "convolution": ((2, 6, 6, 16), (3, 3, 16, 8), {}),
    "strides": ((2, 6, 6, 16), (3, 3, 16, 8), {"strides": 2, "padding": "VALID"}),
    "one axis": ((2, 6, 16), (3, 16, 8), {"padding": [(2, 0)]}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_measured(name, monkeypatch):
    x_shape, shape, options = CASES[name]
    dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
    seen = []

    def medians(forms, repeats):
        seen.extend(run() for run in forms)
        return times(forms, repeats)

    times = pays._medians
    monkeypatch.setattr(pays, "_medians", medians)
    x = jax.ShapeDtypeStruct(x_shape, dtype)
    found = dstee.tiles_pay(x, shape, 0.75, (4, 8), repeats=2, **options)
    assert found.dense_ms > 0
    assert found.tiled_ms > 0
    assert found.speedup == found.dense_ms / found.tiled_ms
    assert found.sparsity == 0.75
    # The same layer, of the same numbers: output and gradient of the input agree.
    (dense, (of_x, of_kernel)), (tiled, (of_x_too, of_rectangle)) = seen
    assert of_kernel.shape == shape
    assert of_rectangle.size == of_kernel.size // 4
    assert of_x.shape == x_shape
    assert {a.dtype for a in jax.tree.leaves(seen)} == {jnp.dtype(dtype)}
    close = 0.1 if name == "bfloat16" else 1e-4
    for a, b in ((dense, tiled), (of_x, of_x_too)):
        assert jnp.allclose(a, b, rtol=close, atol=close * float(jnp.abs(a).max()))


def test_an_array_will_do_and_the_sparsity_is_that_of_whole_tiles():
    found = dstee.tiles_pay(jnp.ones((2, 32)), [32, 16], 0.99, (8, 8), repeats=1)
    assert found.sparsity == 0.75  # one tile of four is the least
    assert dstee.tiles_pay(jnp.ones((2, 32)), (32, 16), 0, (8, 8), repeats=1).sparsity == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (8, 16)}, r"x of shape \(8, 16\) has 16 inputs and kernel_shape=\(32, 16\) 32"),
        ({"x": ()}, r"x of shape \(\) and kernel_shape=\(32, 16\) are no layer"),
        ({"kernel_shape": (3, 32, 16)}, "are no layer: .* or x .batch, .places, inputs"),
        ({"kernel_shape": (32,)}, r"kernel_shape=\(32,\) are no layer"),
        ({"kernel_shape": (32, 0)}, r"kernel_shape=\(32, 0\) are no layer"),
        ({"dtype": jnp.int32}, "dtype int32, which has no gradient: pass float32"),
        ({"tile": (5, 8)}, r"tile=\(5, 8\) does not divide .*\(32, 16\): choose another"),
        ({"tile": (8,)}, r"tile=\(8,\) must be two sizes"),
        ({"tile": (0, 8)}, r"tile=\(0, 8\) must be two sizes"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
        ({"sparsity": 90}, "sparsity=90 must be in"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
    ],
)
def test_bad_input(change, message):
    asked = {"x": (8, 32), "dtype": jnp.float32, "kernel_shape": (32, 16), "sparsity": 0.5}
    asked |= {"tile": (8, 8), "repeats": 1} | change
    x = jax.ShapeDtypeStruct(asked.pop("x"), asked.pop("dtype"))
    with pytest.raises(ValueError, match=message):
        dstee.tiles_pay(x, **asked)


def test_within_jit_nothing_can_be_measured():
    def inside(x):
        dstee.tiles_pay(x, (32, 16), 0.5, (8, 8))
        return x

    with pytest.raises(ValueError, match="within jit nothing runs: call it before"):
        jax.jit(inside)(jnp.ones((8, 32)))
