import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dstee_jax as dstee
from dstee_jax.distributions import active_counts
from tests import oracle

SHAPES = {"a": (3, 3, 3, 64), "b": (3, 3, 64, 128), "c": (3, 3, 128, 512), "d": (512, 10)}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_agrees_with_the_oracle(sparsity):
    ours = [1 - s for s in dstee.erk(SHAPES, sparsity).values()]
    np.testing.assert_allclose(ours, oracle.erk(list(SHAPES.values()), sparsity), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(4, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 0.9),
    distribution=st.sampled_from([dstee.erk, dstee.uniform]),
)
def test_total_is_within_three_halves_of_a_weight_per_leaf(shapes, sparsity, distribution):
    """RigL's ERK rounds the zeros of each leaf down, and the counts are rounded."""
    named = {str(i): tuple(s) for i, s in enumerate(shapes)}
    counts = active_counts(named, sparsity, distribution)
    target = sum((1 - sparsity) * math.prod(s) for s in shapes)
    assert abs(sum(counts.values()) - target) <= 1.5 * len(shapes)
    assert all(1 <= counts[n] <= math.prod(s) for n, s in named.items())


def test_resnet50_dense_leaves():
    """METHODS: 8 dense leaves at 80% ERK, 1 at 90%, none from 95%."""
    shapes = {"stem": (7, 7, 3, 64), "fc": (2048, 1000)}
    inputs = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            if block == 0:
                shapes[f"{stage}.{block}.down"] = (1, 1, inputs, 4 * width)
            shapes[f"{stage}.{block}.1"] = (1, 1, inputs, width)
            shapes[f"{stage}.{block}.2"] = (3, 3, width, width)
            shapes[f"{stage}.{block}.3"] = (1, 1, width, 4 * width)
            inputs = 4 * width
    for sparsity, dense in [(0.8, 8), (0.9, 1), (0.95, 0), (0.98, 0)]:
        assert sum(s == 0 for s in dstee.erk(shapes, sparsity).values()) == dense


def test_uniform_first_layer_dense():
    first_dense = functools.partial(dstee.uniform, first_dense=True)
    assert list(first_dense(SHAPES, 0.9).values()) == [0.0, 0.9, 0.9, 0.9]
    assert list(dstee.uniform(SHAPES, 0.9).values()) == [0.9] * 4


def test_sparsity_by_path_and_callable():
    params = {"a": {"kernel": jnp.ones((10, 10))}, "b": {"kernel": jnp.ones((10, 20))}}
    key = jax.random.key(0)
    masks = dstee.init_masks(params, {"a/kernel": 0.5, "b/kernel": 0.9}, key)
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [50, 20]
    half = lambda shapes, sparsity: dict.fromkeys(shapes, sparsity / 2)  # noqa: E731
    masks = dstee.init_masks(params, 0.5, key, distribution=half)
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [75, 150]


def test_bad_input():
    for value in (-0.1, 1.0, 95):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            active_counts(SHAPES, value)
    with pytest.raises(ValueError, match="leaves no weight in d"):
        active_counts({"d": (3, 3)}, 0.99, dstee.uniform)
    with pytest.raises(ValueError, match=r"names \['z'\]"):
        active_counts(SHAPES, {"z": 0.5})
    with pytest.raises(ValueError, match="the distribution returned"):
        active_counts(SHAPES, 0.5, lambda shapes, sparsity: {})
