"""CHT: its scores against paths counted one by one, sampling against exact chances, its rounds."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import methods, plans, scores

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS = 40


def leaf_of(mask, w=None, key=KEY):
    mask = jnp.asarray(mask)
    w = jnp.ones(mask.shape) * mask if w is None else jnp.asarray(w, jnp.float32)
    return dstee.Leaf(w, w, mask, mask.astype(jnp.uint16), key, jnp.int32(1))


def by_paths(mask, kind):
    """The score of each inactive entry from its paths u-z1-z2-v, by the theory's words.

    An inner node z counts once, however many paths go through it: its links into the local
    community are those to inner nodes on such paths, its links out all but these and the one to
    u or v.
    """
    rows, columns = mask.shape
    out = np.zeros(mask.shape)
    for u, v in itertools.product(range(rows), range(columns)):
        if mask[u, v]:
            continue
        paths = [
            (z1, z2)
            for z1 in range(columns)
            for z2 in range(rows)
            if mask[u, z1] and mask[z2, z1] and mask[z2, v]
        ]
        inner = [("column", z1, mask[:, z1].sum()) for z1 in {z1 for z1, _ in paths}]
        inner += [("row", z2, mask[z2].sum()) for z2 in {z2 for _, z2 in paths}]
        outside = {}
        for side, z, degree in inner:
            within = sum(z == path[side == "row"] for path in paths)
            outside[side, z] = degree - within - 1
            if kind != "l3p":
                out[u, v] += ((within + 1) if kind == "ch2" else 1) / (outside[side, z] + 1)
        for z1, z2 in paths if kind == "l3p" else []:
            e1, e2 = outside["column", z1], outside["row", z2]
            out[u, v] += 1 / math.sqrt((1 + e1) * (1 + e2))
    return out


@pytest.mark.parametrize("shape", [(7, 5), (6, 9), (4, 4)])
@pytest.mark.parametrize("kind", ["ch2", "ch3", "l3p"])
def test_scores_are_those_of_the_paths(kind, shape):
    named = {"ch2": scores.ch2_l3n, "ch3": scores.ch3_l3n, "l3p": scores.ch3_l3p}
    score = jax.jit(named[kind]())
    some = 0
    for density in (0.2, 0.4, 0.7):
        mask = RNG.random(shape) < density
        expected, got = by_paths(mask, kind), np.asarray(score(leaf_of(mask)))
        joined = ~mask & (expected > 0)
        np.testing.assert_allclose(got[joined], expected[joined], rtol=1e-6)
        apart = got[~mask & (expected == 0)]
        assert ((apart <= 0) & (apart > -1)).all()
        assert len(set(apart)) == apart.size  # at random, not in the order of their indices
        other = np.asarray(score(leaf_of(mask.T)))
        np.testing.assert_allclose(other[joined.T], expected.T[joined.T], rtol=1e-6)
        some += joined.sum()
    assert some > 5


def test_a_small_table():
    """u1-v1-u2 and u1-v2: the path u2-v1-u1-v2 is all there is, and nothing leads out of it."""
    mask = np.array([[True, True, False], [True, False, False]])
    got = np.asarray(scores.ch2_l3n()(leaf_of(mask)))
    assert got[1, 1] == 4.0  # (1 + 1) / (1 + 0) for u1 and for v1
    assert (got[:, 2] <= 0).all()
    mask[0, 2] = True  # a link of u1 that leads out
    assert np.asarray(scores.ch2_l3n()(leaf_of(mask)))[1, 1] == 2 + 1
    assert np.asarray(scores.ch3_l3n()(leaf_of(mask)))[1, 1] == 1 + 0.5


def test_relative_importance():
    mask = RNG.random((6, 4)) < 0.5
    mask[2], mask[:, 1] = False, False  # units without links
    w = RNG.normal(size=(6, 4)) * mask
    expected = np.zeros_like(w)
    for i, j in zip(*np.nonzero(mask), strict=True):
        expected[i, j] = abs(w[i, j]) * (1 / abs(w[:, j]).sum() + 1 / abs(w[i]).sum())
    np.testing.assert_allclose(scores.relative_importance()(leaf_of(mask, w)), expected, rtol=1e-5)


def test_saliency_over_its_norm():
    mask = RNG.random((6, 4)) < 0.5
    w, g = RNG.normal(size=(6, 4)) * mask, RNG.normal(size=(6, 4))
    leaf = leaf_of(mask, w)._replace(grad=jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(scores.saliency()(leaf), abs(w * g), rtol=1e-5)
    expected = abs(w * g) / np.linalg.norm(w * g)
    np.testing.assert_allclose(scores.normalized(scores.saliency())(leaf), expected, rtol=1e-5)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_sampled_draws_without_replacement_in_proportion(power):
    weights, k, draws = np.array([1.0, 2.0, 3.0, 0.5]), 2, 20_000
    chances = np.zeros(4)
    for first, second in itertools.permutations(range(4), k):
        p = weights**power
        both = p[first] / p.sum() * p[second] / (p.sum() - p[first])
        chances[[first, second]] += both
    leaf = leaf_of(np.ones((2, 2), bool), weights.reshape(2, 2))
    score = scores.sampled(scores.magnitude(), lambda count: power * count)

    def draw(key):
        keys = score(leaf._replace(key=key)).ravel()
        return jnp.zeros(4).at[jax.lax.top_k(keys, k)[1]].set(1.0)

    shares = np.asarray(jax.vmap(draw)(jax.random.split(KEY, draws)).mean(0))
    np.testing.assert_allclose(shares, chances, atol=4 * 0.5 / math.sqrt(draws))


def test_sampled_takes_zeros_last_and_at_random():
    w = np.where(np.arange(40) < 10, 1e-30, 0.0).reshape(8, 5)
    leaf, score = leaf_of(np.ones((8, 5), bool), w), scores.sampled(scores.magnitude(), 2.0)
    keys = np.stack([score(leaf._replace(key=jax.random.key(i))).ravel() for i in (0, 1)])
    assert np.isfinite(keys).all()
    assert (keys[:, :10].min(1) > keys[:, 10:].max(1)).all()
    assert (np.argsort(keys[0, 10:]) != np.argsort(keys[1, 10:])).any()


def make_params():
    k1, k2 = jax.random.split(jax.random.key(7))
    return {
        "a": {"kernel": jax.random.normal(k1, (12, 20)), "bias": jnp.ones(20)},
        "b": {"kernel": 3 * jax.random.normal(k2, (20, 8)), "bias": jnp.ones(8)},
    }


def trajectory(tx):
    params = make_params()
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    update = jax.jit(lambda g, s, p: dstee.apply(tx, g, s, p))
    history = [(params, state)]
    for step in range(STEPS):
        keys = jax.random.split(jax.random.key(step), 4)
        leaves, treedef = jax.tree.flatten(params)
        draws = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        params, state = update(treedef.unflatten(draws), state, params)
        history.append((params, state))
    return history


def test_cht_drops_by_magnitude_and_grows_by_the_mask_that_is_left():
    tx = methods.cht(optax.sgd(0.01), sparsity=0.6, total_steps=STEPS, every=10, key=KEY)
    assert list(dstee.mask_steps_of(tx)) == [10, 11, 20, 21, 30, 31, 40]
    history = trajectory(tx)
    for t in range(1, STEPS + 1):
        (params, state), (after, new) = history[t - 1 : t + 1]
        for name in ("a", "b"):
            w, mask = (np.asarray(x[name]["kernel"]) for x in (params, state.masks))
            now, w_now = (np.asarray(x[name]["kernel"]) for x in (new.masks, after))
            assert not w_now[~now].any()
            expected = mask.copy()
            if t in (10, 20, 30):
                flat = np.flatnonzero(mask)
                order = sorted(flat, key=lambda i, w=w: (abs(w.ravel()[i]), i))
                expected.ravel()[order[: math.floor(np.float32(0.3) * mask.sum())]] = False
                np.testing.assert_array_equal(now, expected)
            elif t in (11, 21, 31):
                before = np.asarray(history[t - 2][1].masks[name]["kernel"])
                score = np.where(mask, -1, by_paths(mask, "l3p"))
                grown = now & ~mask
                assert (mask & ~now).sum() == 0
                assert now.sum() == before.sum()
                worst, best_left = score[grown].min(), score[~now].max()
                assert worst >= best_left * (1 - 1e-6)
            else:
                np.testing.assert_array_equal(now, mask)
            if t in (10, 11, 20, 21, 30, 31):  # no weight is updated
                np.testing.assert_array_equal(w_now, w * now)
    first, last = (history[i][1].masks["b"]["kernel"] for i in (0, -1))
    assert (first != last).any()


def without_chains(first, second):
    """Links of hidden units without inputs or outputs go until no more are found."""
    first, second = first.copy(), second.copy()
    while True:
        dead = ~(first.any(0) & second.any(1))
        if not first[:, dead].any() and not second[dead].any():
            return first, second
        first[:, dead], second[dead] = False, False


@pytest.mark.optimized(False)
def test_chain_removal_takes_the_links_of_units_without_inputs_or_outputs():
    chain = ("a/kernel", "b/kernel")
    tx = methods.cht(
        optax.sgd(0.01), sparsity=0.85, total_steps=STEPS, every=10, chain=chain, key=KEY
    )
    history = trajectory(tx)
    removed = 0
    for t in range(1, STEPS + 1):
        (params, state), (after, new) = history[t - 1 : t + 1]
        masks, now = ([np.asarray(s.masks[n]["kernel"]) for n in "ab"] for s in (state, new))
        if t in (10, 20, 30):
            left = []
            for name, mask in zip("ab", masks, strict=True):
                w, kept = np.abs(np.asarray(params[name]["kernel"])), mask.copy()
                flat = sorted(np.flatnonzero(mask), key=lambda i, w=w: (w.ravel()[i], i))
                kept.ravel()[flat[: math.floor(np.float32(0.3) * mask.sum())]] = False
                left.append(kept)
            expected = without_chains(*left)
            removed += sum(m.sum() for m in left) - sum(m.sum() for m in expected)
            for one, other, name, old in zip(now, expected, "ab", masks, strict=True):
                np.testing.assert_array_equal(one, other)
                before, count = (np.asarray(s.counters[name]["kernel"]) for s in (state, new))
                np.testing.assert_array_equal(count, before + other)
                np.testing.assert_array_equal(
                    after[name]["kernel"], np.asarray(params[name]["kernel"]) * (old & other)
                )
        elif t in (11, 21, 31):  # as many as have been there are there again
            before = [np.asarray(history[t - 2][1].masks[n]["kernel"]) for n in "ab"]
            assert [m.sum() for m in now] == [m.sum() for m in before]
            assert all((m <= n).all() for m, n in zip(masks, now, strict=True))
    assert removed > 5


@pytest.mark.parametrize("widths", [(4, 6, 5, 3), (3, 8, 8, 8, 2)])
def test_linked_goes_on_along_the_chain(widths):
    rng, names = np.random.default_rng(0), [f"l{i}" for i in range(len(widths) - 1)]
    for _ in range(50):
        masks = [rng.random(pair) < 0.25 for pair in itertools.pairwise(widths)]
        expected = [m.copy() for m in masks]
        while True:
            before = [m.copy() for m in expected]
            for i in range(len(expected) - 1):
                expected[i : i + 2] = without_chains(*expected[i : i + 2])
            if all((a == b).all() for a, b in zip(before, expected, strict=True)):
                break
        got = plans.linked(names, names, list(map(jnp.asarray, masks)))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    dense = optax.MaskedNode()
    masks[1] = dense
    assert plans.linked(names, names, masks)[1] is dense


@pytest.mark.optimized(False)
@pytest.mark.parametrize("name", ["cht", "chts"])
def test_counts_come_back_and_dense_leaves_stay(name):
    tx = getattr(methods, name)(
        optax.adam(0.01),
        sparsity={"a/kernel": 0.8, "b/kernel": 0.0},
        total_steps=STEPS,
        every=7,
        key=KEY,
    )
    between = set(dstee.mask_steps_of(tx)[::2])
    counts = []
    for t, (params, state) in enumerate(trajectory(tx)):
        mask = np.asarray(state.masks["a"]["kernel"])
        assert not np.asarray(params["a"]["kernel"])[~mask].any()
        assert np.asarray(state.masks["b"]["kernel"]).all()
        assert np.asarray(params["b"]["kernel"]).all()
        counts.append(int(mask.sum()))
        assert counts[-1] == 48 or (t in between and counts[-1] < 48)
    assert min(counts) < 48
    assert counts[-1] == 48


def test_chts_keeps_more_of_the_largest_as_its_power_rises():
    """Of many rounds with one mask: the share of the larger half that survives a drop."""
    shares = []
    for last in (0.0, 1.0, 6.0):
        tx = methods.chts(
            optax.sgd(0.0),
            sparsity=0.5,
            total_steps=STEPS,
            every=2,
            update_weights=True,
            key=KEY,
            last_power=last,
        )
        kept = []
        history = trajectory(tx)
        for t in dstee.mask_steps_of(tx)[8::2]:
            (params, state), (_, new) = history[t - 1 : t + 1]
            w, mask, now = (
                np.abs(np.asarray(x["a"]["kernel"])) for x in (params, state.masks, new.masks)
            )
            large = (w > np.median(w[mask])) & mask
            kept.append((now & large).sum() / max(large.sum(), 1))
        shares.append(np.mean(kept))
    assert shares == sorted(shares)


def test_soft_growth_draws_other_masks_for_other_keys():
    masks = []
    for seed in (0, 1):
        tx = dstee.transform(
            optax.sgd(0.0),
            masks={"kernel": np.tile(np.eye(8, dtype=bool) | np.eye(8, k=1, dtype=bool), (1, 2))},
            total_steps=10,
            every=2,
            drop_fraction=optax.constant_schedule(0.2),
            plan=plans.drop_then_grow(),
            grow=scores.sampled(scores.ch2_l3n()),
            key=jax.random.key(seed),
        )
        params = {"kernel": jnp.arange(1.0, 129).reshape(8, 16)}
        state = tx.init(params)
        for _ in range(4):
            params, state = dstee.apply(tx, params, state, params)
        masks.append(np.asarray(state.masks["kernel"]))
    assert masks[0].sum() == masks[1].sum() == 30
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: methods.cht(every=2, **o), "3 or more steps: .* on neither a weight is updated"),
        (
            lambda o: methods.cht(every=1, update_weights=True, **o),
            "every=1 must be a number of 2 or more steps",
        ),
        (lambda o: methods.cht(every=1, **o), "every=1 must be a number of 3 or more steps"),
        (lambda o: methods.chts(every=lambda s: 5, **o), "must be a number of 3 or more steps"),
        (lambda o: plans.linked(("a",), ["a", "b"], []), "must be two or more of the leaves"),
        (lambda o: plans.linked(("a", "c"), ["a", "b"], []), "must be two or more of the leaves"),
        (
            lambda o: plans.linked(("a", "b"), ["a", "b"], [np.ones((2, 3)), np.ones((2, 3))]),
            r"b of shape \(2, 3\) do not follow each other",
        ),
        (lambda o: methods.chts(last_power=-1.0, **o), "last_power=-1.0 must be 0 or more"),
        (
            lambda o: scores.ch2_l3n()(leaf_of(np.ones((3, 3, 2, 4), bool))),
            r"shape \(3, 3, 2, 4\) has not two axes.*leave convolutions dense",
        ),
        (
            lambda o: scores.relative_importance()(leaf_of(np.ones(3, bool))),
            "has not two axes",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(dict(sparsity=0.9, total_steps=100, key=KEY))
