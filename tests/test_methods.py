"""Every method against a NumPy oracle written from its paper, and its counts step by step."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dstee_jax as dstee
from dstee_jax import methods, plans

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)
STEPS = 60
NAMES = ("a", "b")


def make_params():
    k1, k2 = jax.random.split(jax.random.key(7))
    return {
        "a": {"kernel": jax.random.normal(k1, (12, 20)), "bias": jnp.ones(20)},
        "b": {"kernel": 3 * jax.random.normal(k2, (20, 8)), "bias": jnp.ones(8)},
    }


def gradients(params, seed):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(draws)


def trajectory(tx, params=None, steps=STEPS):
    """Parameters, state and gradient of every step, as NumPy arrays by leaf name."""
    params = make_params() if params is None else params
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    update = jax.jit(tx.update)
    history = []
    for step in range(steps):
        grads = gradients(params, step)
        updates, new = update(grads, state, params)
        history.append((params, state, grads))
        params, state = optax.apply_updates(params, updates), new
    return [*history, (params, state, None)]


def kernel(tree, name):
    return np.asarray(tree[name]["kernel"])


def draw(step, name, number):
    """The documented stream: key, step, leaf in order (a/bias, a/kernel, ...), then the use."""
    key = KEY
    for n in (step, 1 + 2 * NAMES.index(name), number):
        key = jax.random.fold_in(key, n)
    return key


def random_score(step, name, shape):
    return np.asarray(jax.random.uniform(draw(step, name, 1), shape))


def swap(mask, drop, grow, k_drop, k_grow, regrow=False):
    """Drop the k_drop active entries of lowest score, grow the k_grow inactive of highest."""
    flat, drop, grow = mask.ravel().copy(), drop.ravel(), grow.ravel()
    dropped = sorted(np.flatnonzero(flat), key=lambda i: (drop[i], i))[:k_drop]
    free = np.union1d(np.flatnonzero(~flat), dropped if regrow else []).astype(int)
    flat[dropped] = False
    flat[sorted(free, key=lambda i: (-grow[i], i))[:k_grow]] = True
    return flat.reshape(mask.shape)


def half_cosine(step, total):
    return 0.5 * ((1 - 0.01) * 0.5 * (1 + math.cos(math.pi * step / total)) + 0.01)


MAKE = dict(sparsity=0.8, total_steps=STEPS, key=KEY)


def test_deep_r():
    lr, l1, noise = 0.05, 0.02, 0.01
    tx = methods.deep_r(optax.sgd(lr), l1=l1, noise=noise, **MAKE)
    steps = trajectory(tx)
    signs = {name: kernel(make_params(), name) > 0 for name in NAMES}
    moved = 0
    for t, ((params, state, grads), (after, new, _)) in enumerate(
        itertools.pairwise(steps), start=1
    ):
        for name in NAMES:
            sign = np.where(signs[name], 1, -1)
            mask, w, g = (kernel(x, name) for x in (state.masks, params, grads))
            walk = np.asarray(jax.random.normal(draw(t, name, 2), w.shape))
            theta = sign * (w - lr * (g + l1 * sign + noise * walk))
            dead = mask & (theta < 0)
            # What died in this step can't come back in it.
            free = np.where(mask, -1.0, random_score(t, name, w.shape))
            grown = swap(mask & ~dead, theta, free, 0, dead.sum())
            np.testing.assert_array_equal(kernel(new.masks, name), grown)
            stays = mask & ~dead
            np.testing.assert_allclose(kernel(after, name), stays * sign * theta, atol=1e-6)
            assert (sign * kernel(after, name) >= 0).all()
            moved += dead.sum()
    assert moved > 50


def test_deep_r_needs_the_optimizer():
    with pytest.raises(ValueError, match="penalty= changes the gradient that reaches inner"):
        methods.deep_r(**MAKE)


def share_out(total, weights, caps):
    """Largest remainders (Hamilton); what a full leaf can't take is shared again."""
    given = np.zeros(len(caps), int)
    while given.sum() < min(total, sum(caps)):
        room = np.array(caps) - given
        part = np.where(room > 0, weights, 0)
        ideal = (total - given.sum()) * part / part.sum()
        more = np.minimum(np.floor(ideal).astype(int), room)
        left = total - given.sum() - more.sum()
        open_ = [i for i in range(len(caps)) if more[i] < room[i]]
        if left < len(caps):
            more[sorted(open_, key=lambda i: (more[i] - ideal[i], i))[:left]] += 1
        given += more
    return given.tolist()


def test_snfs():
    tx = methods.snfs(optax.sgd(0.01), every=7, **MAKE)
    steps = trajectory(tx)
    momentum = {name: np.zeros(kernel(make_params(), name).shape) for name in NAMES}
    counts = set()
    for t, ((params, state, grads), (_after, new, _)) in enumerate(
        itertools.pairwise(steps), start=1
    ):
        for name in NAMES:
            momentum[name] = 0.9 * momentum[name] + kernel(grads, name)
            np.testing.assert_allclose(
                kernel(new.rule_state.memory, name), momentum[name], rtol=1e-5, atol=1e-6
            )
        masks = {name: kernel(state.masks, name) for name in NAMES}
        counts.add(tuple(int(m.sum()) for m in masks.values()))
        if t % 7:
            continue
        rate = half_cosine(t, STEPS)
        drops = [max(1, math.floor(rate * masks[name].sum())) for name in NAMES]
        importance = [abs(momentum[name])[masks[name]].mean() for name in NAMES]
        caps = [math.floor(0.99 * (~masks[name]).sum()) for name in NAMES]
        grows = share_out(sum(drops), importance, caps)
        for name, k_drop, k_grow in zip(NAMES, drops, grows, strict=True):
            w = kernel(params, name) - 0.01 * kernel(grads, name) * masks[name]
            expected = swap(masks[name], abs(w), abs(momentum[name]), k_drop, k_grow)
            np.testing.assert_array_equal(kernel(new.masks, name), expected)
    assert len(counts) > 3  # weights moved between the leaves
    assert len({sum(c) for c in counts}) == 1


@pytest.mark.parametrize("share", [0.5, 1e9])
def test_gse(share):
    """Over both leaves: the largest gradients of the subset grow, as many small weights go."""
    tx = methods.gse(optax.sgd(0.01), every=6, share=share, drop_fraction=0.19, **MAKE)
    steps = trajectory(tx)
    total = sum(int(kernel(steps[0][1].masks, n).sum()) for n in NAMES)
    counts = []
    for t in range(6, 36, 6):
        (params, state, grads), (after, new, _) = steps[t - 1], steps[t]
        masks = {n: kernel(state.masks, n) for n in NAMES}
        weight = {n: kernel(params, n) - 0.01 * kernel(grads, n) * masks[n] for n in NAMES}
        free, active = [], []
        for n in NAMES:
            mask, size = masks[n], masks[n].size
            u = np.asarray(jax.random.uniform(jax.random.fold_in(draw(t, n, 1), 1), mask.shape))
            inside = u < 1 - (1 - 1 / size) ** (share * mask.sum())
            inside |= mask.sum() >= size / 2
            g = abs(kernel(grads, n))
            free += [(g[i], n, i) for i in zip(*np.nonzero(~mask & inside), strict=True)]
            active += [(abs(weight[n])[i], n, i) for i in zip(*np.nonzero(mask), strict=True)]
        k = math.floor(np.float32(0.095 * (1 + math.cos(math.pi * t / 36))) * total)
        expected = {n: masks[n].copy() for n in NAMES}
        for value, places in ((True, sorted(free)[::-1][:k]), (False, sorted(active)[:k])):
            for _, n, i in places:
                expected[n][i] = value
        assert len(free) > k
        for n in NAMES:
            now = kernel(new.masks, n)
            np.testing.assert_array_equal(now, expected[n])
            np.testing.assert_allclose(kernel(after, n), weight[n] * (masks[n] & now), atol=1e-6)
        counts.append([int(kernel(new.masks, n).sum()) for n in NAMES])
        assert sum(counts[-1]) == total
    assert len({tuple(c) for c in counts}) > 1


def test_a_subset_has_as_many_candidates_as_pairs_that_are_drawn():
    """Pairs with replacement, n of them, drawn a thousand times, against the score's candidates."""
    rng, (rows, columns), n = np.random.default_rng(0), (6, 8), 12
    mask = jnp.asarray(np.arange(48).reshape(rows, columns) < n)
    leaf = dstee.Leaf(1.0 * mask, 1.0 * mask, mask, mask, KEY, jnp.int32(1))
    score = dstee.scores.subset(dstee.scores.gradient())
    found = jax.vmap(lambda key: jnp.isfinite(score(leaf._replace(key=key))))(
        jax.random.split(KEY, 4000)
    )
    pairs = rng.integers(0, rows, (4000, n)), rng.integers(0, columns, (4000, n))
    drawn = np.zeros((4000, rows, columns), bool)
    for i in range(n):
        drawn[np.arange(4000), pairs[0][:, i], pairs[1][:, i]] = True
    np.testing.assert_allclose(np.mean(found, 0), drawn.mean(0), atol=0.04)
    assert abs(float(np.mean(found)) - drawn.mean()) < 0.005
    half = leaf._replace(mask=jnp.asarray(np.arange(48).reshape(rows, columns) < 24))
    assert jnp.isfinite(score(half)).all()


def test_overall_exchange_grows_what_it_can():
    """Two candidates alone: two weights move."""

    def few(leaf):
        return jnp.where(jnp.arange(leaf.mask.size).reshape(leaf.mask.shape) < 1, 1.0, -jnp.inf)

    masks = {
        name: {"kernel": np.zeros(s, bool), "bias": optax.MaskedNode()}
        for name, s in (("a", (12, 20)), ("b", (20, 8)))
    }
    for m in masks.values():
        m["kernel"][5] = True
    tx = dstee.transform(
        optax.sgd(0.0),
        masks=masks,
        plan=plans.exchange(overall=True),
        grow=few,
        every=2,
        total_steps=20,
        drop_fraction=0.5,
        key=KEY,
    )
    *_, (_, state, _) = trajectory(tx, steps=3)
    assert sum(int(kernel(state.masks, n).sum()) for n in NAMES) == 28
    assert all(kernel(state.masks, n)[0, 0] for n in NAMES)


def test_dsr():
    tx = methods.dsr(
        optax.sgd(0.0), every=5, threshold=0.01, drop_fraction=optax.constant_schedule(0.2), **MAKE
    )
    steps = trajectory(tx)
    threshold, seen = 0.01, []
    for t, ((params, state, _), (_, new, _)) in enumerate(itertools.pairwise(steps), start=1):
        if t % 5 or t > 0.95 * STEPS:
            continue
        masks = {name: kernel(state.masks, name) for name in NAMES}
        drops = [
            min((masks[n] & (abs(kernel(params, n)) < threshold)).sum(), masks[n].sum() - 1)
            for n in NAMES
        ]
        left = [masks[n].sum() - d for n, d in zip(NAMES, drops, strict=True)]
        grows = share_out(sum(drops), left, [(~masks[n]).sum() for n in NAMES])
        for name, k_drop, k_grow in zip(NAMES, drops, grows, strict=True):
            score = random_score(t, name, masks[name].shape)
            expected = swap(masks[name], abs(kernel(params, name)), score, k_drop, k_grow)
            np.testing.assert_array_equal(kernel(new.masks, name), expected)
        wanted = 0.2 * sum(m.sum() for m in masks.values())
        seen.append((threshold, sum(drops)))
        if sum(drops) < 0.9 * wanted:
            threshold *= 2
        elif sum(drops) > 1.1 * wanted:
            threshold /= 2
        np.testing.assert_allclose(new.rule_state.plan, threshold, rtol=1e-6)
    assert {b > a for (a, _), (b, _) in itertools.pairwise(seen)} == {True, False}


def test_dsr_rounds_come_less_often():
    tx = methods.dsr(optax.sgd(0.1), sparsity=0.8, total_steps=4000, key=KEY, threshold=1e9)
    params = make_params()
    state, update = tx.init(params), jax.jit(tx.update)
    grads = gradients(params, 0)
    changed = []
    for step in range(1, 2401):  # nothing is ever above that threshold: each round moves masks
        if step % 50 == 0:
            _, new = update(grads, state._replace(count=jnp.int32(step - 1)), params)
            if not jnp.array_equal(new.masks["a"]["kernel"], state.masks["a"]["kernel"]):
                changed.append(step)
    # 100 steps apart in the first quarter, then 200, then 400
    assert changed == [*range(100, 1001, 100), *range(1200, 2001, 200), 2400]


def test_mest():
    tx = methods.mest(optax.sgd(0.01), every=6, gradient_weight=0.5, **MAKE)
    steps = trajectory(tx)
    for t in (6, 24, 48):  # one in each third: 0.3, 0.15, 0.075
        (params, state, grads), (_, new, _) = steps[t - 1], steps[t]
        for name in NAMES:
            mask, g = kernel(state.masks, name), kernel(grads, name)
            w = kernel(params, name) - 0.01 * g * mask
            k = max(1, math.floor(np.float32(0.3 * 0.5 ** ((t >= 20) + (t >= 40))) * mask.sum()))
            score = random_score(t, name, mask.shape)
            expected = swap(mask, abs(w) + 0.5 * abs(g), score, k, k)
            np.testing.assert_array_equal(kernel(new.masks, name), expected)


def test_mest_moves_a_share_of_all_weights():
    tx = methods.mest(optax.sgd(0.01), every=6, mutation=0.05, gradient_weight=0.5, **MAKE)
    steps = trajectory(tx)
    moved = {t: 0.05 if t < 34 else 0.025 for t in range(6, 46, 6)}
    for t in range(1, STEPS + 1):
        (params, state, grads), (_, new, _) = steps[t - 1], steps[t]
        for name in NAMES:
            mask, g = kernel(state.masks, name), kernel(grads, name)
            w = kernel(params, name) - 0.01 * g * mask
            k = math.floor(np.float32(moved.get(t, 0)) * mask.size)
            score = random_score(t, name, mask.shape)
            expected = swap(mask, abs(w) + 0.5 * abs(g), score, k, k)
            np.testing.assert_array_equal(kernel(new.masks, name), expected)


def test_set_as_published_drops_on_both_sides_of_zero():
    tx = methods.set(optax.sgd(0.01), zeta=0.3, every=10, **MAKE)
    steps = trajectory(tx)
    for t in range(10, STEPS + 1, 10):
        (params, state, grads), (after, new, _) = steps[t - 1], steps[t]
        for name in NAMES:
            mask = kernel(state.masks, name)
            w = (kernel(params, name) - 0.01 * kernel(grads, name)) * mask
            k = math.floor(np.float32(0.3) * mask.sum())
            negative = sorted(np.flatnonzero(mask & (w < 0)), key=lambda i, w=w: -w.ravel()[i])
            positive = sorted(np.flatnonzero(mask & (w >= 0)), key=lambda i, w=w: w.ravel()[i])
            below = math.floor(np.float32(0.3) * len(negative))
            gone = [*negative[:below], *positive[: k - below]]
            assert abs(len(gone) - below - 0.3 * len(positive)) <= 1
            left, free = mask.copy(), random_score(t, name, mask.shape).copy()
            left.ravel()[gone] = False
            free[left] = -1
            left.ravel()[np.argsort(-free.ravel())[:k]] = True
            np.testing.assert_array_equal(kernel(new.masks, name), left)
            np.testing.assert_allclose(kernel(after, name), w * (mask & left), atol=1e-6)


def test_granet():
    tx = methods.granet(optax.sgd(0.01), every=6, **MAKE)
    steps = trajectory(tx)
    total = sum(kernel(make_params(), name).size for name in NAMES)
    first = sum(kernel(steps[0][1].masks, name).sum() for name in NAMES)
    assert abs(first - total / 2) <= 2
    last = round(0.2 * 240) + round(0.2 * 160)
    for t in range(6, STEPS + 1, 6):
        (params, state, grads), (_, new, _) = steps[t - 1], steps[t]
        masks = {n: kernel(state.masks, n) for n in NAMES}
        weight = {n: kernel(params, n) - 0.01 * kernel(grads, n) * masks[n] for n in NAMES}
        goal = last + round((first - last) * (1 - min(t / (0.5 * STEPS), 1)) ** 3)
        entries = [
            (abs(weight[n]).ravel()[i], n) for n in NAMES for i in np.flatnonzero(masks[n].ravel())
        ]
        prune = sum(m.sum() for m in masks.values()) - goal
        gone = [name for _, name in sorted(entries)[: max(prune, 0)]]
        for name in NAMES:
            left = masks[name].sum() - gone.count(name)
            k = max(1, math.floor(np.float32(half_cosine(t, STEPS)) * left))
            grad = abs(kernel(grads, name))
            expected = swap(
                masks[name], abs(weight[name]), grad, gone.count(name) + k, k, regrow=True
            )
            np.testing.assert_array_equal(kernel(new.masks, name), expected)
        assert sum(kernel(new.masks, n).sum() for n in NAMES) == goal


def test_gmp_keeps_the_largest_on_a_cubic_schedule():
    tx = methods.gmp(optax.sgd(0.01), every=5, start=0.1, stop=0.75, **MAKE)
    steps = trajectory(tx)
    goals = {name: int(steps[-1][1].masks[name]["kernel"].sum()) for name in NAMES}
    assert abs(sum(goals.values()) - 0.2 * 400) <= 2
    for t in range(10, 46, 5):
        (params, state, grads), (after, new, _) = steps[t - 1], steps[t]
        left = 1 - (t / STEPS - 0.1) / 0.65 if t < 45 else 0
        for name in NAMES:
            mask = kernel(state.masks, name)
            n = goals[name] + round((mask.size - goals[name]) * left**3)
            w = kernel(params, name) - 0.01 * kernel(grads, name) * mask
            expected = swap(mask, abs(w), w, mask.sum() - n, 0)
            np.testing.assert_array_equal(kernel(new.masks, name), expected)
            np.testing.assert_allclose(kernel(after, name), w * expected, atol=1e-6)


def test_gap_rotates_dense_parts_and_prunes_in_the_end():
    tx = methods.gap(optax.sgd(0.01), partitions=2, **MAKE)  # rounds at 12, 24, 36, 48
    steps = trajectory(tx)
    for t, dense in [(5, "a"), (12, "b"), (24, "a"), (36, "b"), (48, None), (59, None)]:
        (params, state, grads), (after, new, _) = steps[t - 1], steps[t]
        for name in NAMES:
            mask, now = kernel(state.masks, name), kernel(new.masks, name)
            target = kernel(steps[-1][1].masks, name).sum()
            w = (kernel(params, name) - 0.01 * kernel(grads, name)) * mask
            if t % 12:  # no round
                expected = mask
            elif name == dense:
                expected = np.ones_like(mask)
            else:  # the largest stay
                expected = swap(mask, abs(w), w, mask.sum() - target, 0)
            np.testing.assert_array_equal(now, expected)
            assert now.sum() == (now.size if name == dense else target)
            np.testing.assert_allclose(kernel(after, name), w * now, atol=1e-6)  # grown: at zero


@pytest.mark.parametrize("overall", [True, False])
def test_ac_dc(overall):
    """Dense to 12, then 6 sparse and 9 dense steps in turn, sparse from 48."""
    tx = methods.ac_dc(
        optax.sgd(0.01),
        start=0.2,
        stop=0.8,
        sparse_phase=0.1,
        dense_phase=0.15,
        plan=plans.alternate(overall=overall),
        **MAKE,
    )
    begins = [12, 18, 27, 33, 48]  # the sparse phase from 42 would end on 48: left out
    assert list(dstee.mask_steps_of(tx)) == begins
    steps = trajectory(tx)
    targets = {name: round(0.2 * kernel(make_params(), name).size) for name in NAMES}
    if not overall:  # erk's own
        targets = {name: int(kernel(steps[-1][1].masks, name).sum()) for name in NAMES}
    masks = {name: np.ones(kernel(make_params(), name).shape, bool) for name in NAMES}
    weight = {name: kernel(make_params(), name).astype(np.float64) for name in NAMES}
    for t in range(1, STEPS + 1):
        for name in NAMES:
            weight[name] = weight[name] - 0.01 * kernel(steps[t - 1][2], name) * masks[name]
        if t in (12, 27, 48):
            entries = [(w, name) for name in NAMES for w in abs(weight[name]).ravel()]
            kept = [name for _, name in sorted(entries)[-sum(targets.values()) :]]
            goals = {name: kept.count(name) for name in NAMES} if overall else targets
            for name, w in weight.items():
                everything = np.ones(w.shape, bool)
                masks[name] = swap(everything, abs(w), w, w.size - goals[name], 0)
                weight[name] = w * masks[name]
        elif t in (18, 33):
            masks = {name: np.ones_like(mask) for name, mask in masks.items()}
        for name in NAMES:
            np.testing.assert_array_equal(kernel(steps[t][1].masks, name), masks[name])
            np.testing.assert_allclose(kernel(steps[t][0], name), weight[name], atol=2e-5)


def test_ac_dc_phases_are_the_papers():
    def begins(total, **shares):
        tx = methods.ac_dc(sparsity=0.9, total_steps=total, key=KEY, **shares)
        return list(dstee.mask_steps_of(tx))

    assert begins(1000) == [*range(100, 751, 50), 850]  # ResNet-50's 100 epochs
    cifar = {"start": 0.05, "stop": 0.85, "sparse_phase": 0.1, "dense_phase": 0.1}
    assert begins(200, **cifar) == list(range(10, 171, 20))
    assert begins(20, start=0.9, stop=0.9) == [18]


def test_global_saliency_is_one_threshold_over_normalized_scores():
    """As JaxPruner's global pruners: |w g| of a leaf over its norm, all leaves together."""
    tx = methods.gmp(
        optax.sgd(0.0),
        overall=True,
        every=30,
        stop=0.5,
        drop=dstee.scores.normalized(dstee.scores.saliency()),
        **MAKE,
    )
    steps = trajectory(tx)
    (params, _, grads), (_, new, _) = steps[29], steps[30]
    entries = []
    for name in NAMES:
        score = abs(kernel(params, name) * kernel(grads, name))
        score = score / (np.linalg.norm(score) + 1e-8)
        entries += [(x, name, i) for i, x in enumerate(score.ravel())]
    best = sorted(entries)[-80:]
    for name in NAMES:
        kept = np.flatnonzero(kernel(new.masks, name).ravel())
        assert kept.tolist() == sorted(i for _, n, i in best if n == name)


@pytest.mark.parametrize("reweighted", [True, False])
def test_admm(reweighted):
    lr, rho = 0.05, 0.5
    tx = methods.admm(optax.sgd(lr), rho=rho, reweighted=reweighted, interval=4, **MAKE)
    steps = trajectory(tx)
    goals = {n: int(kernel(steps[-1][1].masks, n).sum()) for n in NAMES}
    weights = {n: kernel(make_params(), n).astype(np.float64) for n in NAMES}
    z, u = ({n: np.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    masks = {n: np.ones(w.shape, bool) for n, w in weights.items()}
    for t in range(1, STEPS + 1):
        for n, w in weights.items():
            g = kernel(steps[t - 1][2], n)
            if 20 < t <= 40:
                a = np.ones_like(w)
                if reweighted:
                    a = 1 / (abs(w) + 0.1 * abs(w).mean())
                    a = a / a.mean()
                g = g + rho * a * (w - z[n] + u[n])
            if 20 <= t <= 40 and (t - 20) % 4 == 0:
                total = w + u[n]
                keep = swap(np.ones(w.shape, bool), abs(total), w, w.size - goals[n], 0)
                z[n] = np.where(keep, total, 0)
                u[n] = total - z[n]
            w -= lr * g * masks[n]
            if t == 40:
                masks[n] = swap(masks[n], abs(w), w, w.size - goals[n], 0)
                w *= masks[n]
        for n, w in weights.items():
            np.testing.assert_allclose(kernel(steps[t][0], n), w, atol=2e-5)
            np.testing.assert_array_equal(kernel(steps[t][1].masks, n), masks[n])


def totals(tx, steps=STEPS):
    return [sum(int(kernel(s.masks, n).sum()) for n in NAMES) for _, s, _ in trajectory(tx)]


MOVING = {
    "deep_r": {},
    "snfs": {"every": 5},
    "dsr": {"every": 5, "threshold": 0.3},
    "mest": {"every": 5},
    "mest_ems": {"every": 5},
    "gse": {"every": 5},
    "granet": {"every": 5},
    "gmp": {"every": 5},
    "gmp_overall": {"every": 5, "overall": True},
    "gap": {"partitions": 2},
    "admm": {},
}


@pytest.mark.optimized(False)
@pytest.mark.parametrize("sparsity", [0.6, 0.9])
@pytest.mark.parametrize("name", MOVING)
def test_totals_and_zeros(name, sparsity):
    """The total is what the method says, at each step; inactive weights are exactly zero."""
    factory = getattr(methods, name.removesuffix("_overall"))
    tx = factory(optax.adam(0.01), **(MAKE | {"sparsity": sparsity}), **MOVING[name])
    steps = trajectory(tx)
    counts = []
    for params, state, _ in steps:
        masks = [kernel(state.masks, n) for n in NAMES]
        counts.append(sum(int(m.sum()) for m in masks))
        assert all(m.any() for m in masks)
        for n, mask in zip(NAMES, masks, strict=True):
            assert not kernel(params, n)[~mask].any()
            assert not kernel(state.inner_state[0].mu, n)[~mask].any()
    assert abs(counts[-1] - (1 - sparsity) * 400) <= 2
    if name in ("deep_r", "snfs", "dsr", "mest", "gse"):
        assert len(set(counts)) == 1
    elif name != "gap":
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1]


@pytest.mark.optimized(False)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), min_size=1, max_size=6),
    total=st.integers(0, 200),
)
@example(rows=[(73, 1)] * 3, total=3)  # 3 * 73 / 219 can be just below 1
def test_apportion(rows, total):
    weights, caps = zip(*rows, strict=True)
    shares = [int(n) for n in _apportion(len(rows))(total, weights, caps)]
    assert sum(shares) == min(total, sum(caps))
    assert all(0 <= n <= cap for n, cap in zip(shares, caps, strict=True))
    free = [i for i, n in enumerate(shares) if n < caps[i]]
    if len(free) > 1 and sum(weights[i] for i in free) > 0 and total:
        # Shares below their caps are in proportion, to less than a few units.
        unit = sum(shares[i] for i in free) / sum(weights[i] for i in free)
        assert all(abs(shares[i] - unit * weights[i]) < len(rows) + 1 for i in free)


@functools.cache
def _apportion(leaves):
    return jax.jit(plans.apportion)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.mest_ems(elastic=0.5, **MAKE), "elastic=0.5 must be 1 or more"),
        (lambda: methods.mest_ems(**(MAKE | {"sparsity": {"a": 0.1}})), "one sparsity for the"),
        (lambda: methods.set(zeta=1.5, **MAKE), "zeta=1.5 must be a share"),
        (lambda: methods.mest(mutation=0.0, **MAKE), "mutation=0.0 must be a share of all"),
        (lambda: methods.gse(share=0.0, **MAKE), "share=0.0 must be above 0"),
        (lambda: methods.gap(partitions=1, **MAKE), "partitions=1 must be at least 2"),
        (lambda: methods.gmp(initial_sparsity=1.0, **MAKE), "initial_sparsity=1.0 must be in"),
        (lambda: methods.ac_dc(start=0.9, **MAKE), "start=0.9, stop=0.85, .* start comes first"),
        (lambda: methods.gmp(start=0.9, **MAKE), "start=0.9 and end=0.75 must be in order"),
        (
            lambda: methods.granet(every=5, **(MAKE | {"sparsity": 0.3})).init(make_params()),
            "starts with 200 active weights, fewer than the 280",
        ),
        (lambda: dstee.memory.dense_momentum(1.0), "decay=1.0 must be in"),
        (lambda: methods.dsr(every=lambda step: 0, **MAKE), "every=0 must be an integer"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradient_scores_without_the_gradient_say_so():
    tx = optax.chain(optax.sgd(0.1), methods.snfs(every=5, **MAKE))
    params = make_params()
    with pytest.raises(ValueError, match="Pass the raw gradient"):
        tx.update(gradients(params, 0), tx.init(params), params)
