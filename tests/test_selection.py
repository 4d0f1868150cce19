import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dstee_jax.selection.bisection import largest_bits
from dstee_jax.selection.drop_and_grow import drop_and_grow
from dstee_jax.selection.exchange import Exchange, exchange
from dstee_jax.selection.largest import largest
from tests import oracle

pytestmark = pytest.mark.optimized
WAYS = ("top_k", "bisection")
jitted_largest = jax.jit(largest, static_argnums=(2, 3))  # one program for all k


@pytest.mark.parametrize("selection", WAYS)
@pytest.mark.parametrize("shape", [(1,), (7,), (40, 30), (3, 3, 8, 16)])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("regrow", [False, True])
def test_agrees_with_the_oracle(selection, shape, ties, regrow):
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.4
    drop, grow = rng.normal(size=(2, *shape)).astype(np.float32)
    if ties:
        drop, grow = drop.round(), grow.round()
    possible = min(mask.sum(), mask.size if regrow else (~mask).sum())
    for k in {0, min(1, possible), possible // 2, possible}:
        k_max = int(mask.size)
        new = drop_and_grow(mask, drop, grow, k, k_max=k_max, regrow=regrow, selection=selection)
        np.testing.assert_array_equal(new, oracle.drop_and_grow(mask, drop, grow, k, regrow))


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)])
def test_scores_of_two_dtypes(dtypes, regrow):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        masks = rng.random((2, 8, 8)) < 0.2
        scores = [rng.normal(size=(2, 8, 8)).astype(dtype) for dtype in dtypes]
        rows = [Exchange(m, *s, (1, 1), 5, None, 64) for m, s in zip(masks, scores, strict=True)]
        new = exchange(rows, regrow=regrow, selection="bisection")
        for row, mask in zip(rows, new, strict=True):
            expected = oracle.drop_and_grow(row.mask, row.drop_score, row.grow_score, 5, regrow)
            np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("size", [1, 3, 4, 15, 16])
def test_none_of_the_highest_keys(size):
    highest = jnp.full(size, 0xFFFFFFFF, jnp.uint32)
    for k in {0, 1, size}:
        (mask,) = largest_bits([highest], jnp.int32(k))
        assert mask.tolist() == [True] * k + [False] * (size - k)


@settings(max_examples=60, deadline=None)
@given(
    score=hnp.arrays(
        np.float32,
        st.sampled_from([(5,), (4, 6), (3, 5, 7)]),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    share=st.floats(0, 1),
)
def test_both_selections_give_the_same_mask(score, share):
    # Subnormals and -0.0 are zeros, as drop_and_grow cleans them.
    score = np.where(np.abs(score) < np.finfo(np.float32).tiny, np.float32(0), score)
    k = round(share * score.size)
    top, bisection = (jitted_largest(score, k, score.size, way) for way in WAYS)
    np.testing.assert_array_equal(top, bisection)
    order = sorted(range(score.size), key=lambda i: (-score.ravel()[i], i))[:k]
    assert set(np.flatnonzero(bisection)) == set(order)


@pytest.mark.parametrize("selection", WAYS)
def test_k_may_be_traced_and_is_clipped(selection):
    mask = jnp.array([True] * 3 + [False] * 5)
    score = jnp.arange(8.0)
    step = jax.jit(lambda k: drop_and_grow(mask, score, score, k, k_max=4, selection=selection))
    for k, kept in [(-3, 3), (0, 3), (2, 1), (3, 0), (100, 0)]:
        new = step(k)
        assert new.sum() == 3
        assert (new & mask).sum() == kept
    assert step._cache_size() == 1


@pytest.mark.parametrize("selection", WAYS)
@pytest.mark.parametrize("regrow", [False, True])
def test_non_finite_scores_never_grow_and_counts_hold(selection, regrow):
    mask = jnp.array([True, True, True, True, False, False, False, False])
    drop = jnp.array([1.0, jnp.nan, 2.0, -jnp.inf, 0, 0, 0, 0])
    grow = jnp.array([jnp.nan] * 4 + [jnp.nan, 0.5, jnp.inf, -jnp.inf])
    new = drop_and_grow(mask, drop, grow, 4, k_max=4, regrow=regrow, selection=selection)
    assert new.sum() == 4
    assert not new[jnp.array([4, 6, 7])].any()
    assert new[5]
    infinite = grow.at[0].set(jnp.inf)  # what was just dropped is no exception
    new = drop_and_grow(mask, drop, infinite, 4, k_max=4, regrow=regrow, selection=selection)
    assert new[5]
    one = drop_and_grow(mask, drop, grow, 1, k_max=4, regrow=regrow, selection=selection)
    assert one.tolist() == [True, True, True, False, False, True, False, False]


def test_k_grow_changes_the_count():
    mask = jnp.array([True, True, False, False, False])
    score = jnp.arange(5.0)
    new = drop_and_grow(mask, score, score, 1, k_max=3, k_grow=3)
    assert new.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_narrow_scores(dtype):
    mask = jnp.array([True, False, False])
    new = drop_and_grow(mask, jnp.ones(3, dtype), jnp.array([0, 1, 2], dtype), 1, k_max=1)
    assert new.tolist() == [False, False, True]


def test_works_under_vmap():
    keys = jax.random.split(jax.random.key(0), 5)
    mask = jax.vmap(lambda k: jax.random.bernoulli(k, 0.3, (20, 20)))(keys)
    score = jax.vmap(lambda k: jax.random.normal(k, (20, 20)))(keys)
    ks = jnp.arange(5) * 7

    def step(m, s, k):
        return drop_and_grow(m, jnp.abs(s), s, k, k_max=40, selection="bisection")

    batched = jax.vmap(step)(mask, score, ks)
    for i in range(5):
        np.testing.assert_array_equal(batched[i], step(mask[i], score[i], ks[i]))


def test_bad_input():
    mask, score = jnp.ones(3, bool), jnp.ones(3)
    with pytest.raises(ValueError, match="dtype float32"):
        drop_and_grow(score, score, score, 1, k_max=1)
    with pytest.raises(ValueError, match=r"shapes \(3,\), \(3,\) and \(2,\)"):
        drop_and_grow(mask, score, score[:2], 1, k_max=1)
    with pytest.raises(ValueError, match="k_max=-1 is negative"):
        drop_and_grow(mask, score, score, 1, k_max=-1)
    with pytest.raises(ValueError, match="'sort' is unknown"):
        drop_and_grow(mask, score, score, 1, k_max=1, selection="sort")


def test_sharded_array_is_not_gathered():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    rng = np.random.default_rng(1)
    mask = jax.device_put(rng.random((64, 512)) < 0.1, sharding)
    score = jax.device_put(rng.normal(size=(64, 512)).astype(np.float32), sharding)

    def step(m, s):
        return drop_and_grow(m, jnp.abs(s), s, 500, k_max=1000, selection="bisection")

    compiled = jax.jit(step, out_shardings=sharding).lower(mask, score).compile()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert all(math.prod(map(int, shape.split(","))) <= 8 for shape in gathered)  # counts alone
    assert "all-to-all" not in compiled.as_text()
    expected = oracle.drop_and_grow(*map(np.asarray, (mask, abs(score), score)), 500, False)
    np.testing.assert_array_equal(compiled(mask, score), expected)
