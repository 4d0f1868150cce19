"""Masks from before training, against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import at_init

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)


def make_params(widths=(6, 9, 7, 4)):
    keys = jax.random.split(jax.random.key(3), len(widths))
    return {
        f"l{i:02}": {"kernel": jax.random.normal(keys[i], pair), "bias": jnp.zeros(pair[1])}
        for i, pair in enumerate(itertools.pairwise(widths))
    }


def network(params, x):
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
    return x


def kernels(tree):
    return [np.asarray(tree[name]["kernel"]) for name in sorted(tree)]


def best(scores, sparsity):
    """The best entries over all arrays, by a plain sort; ties to the first."""
    flat = np.concatenate([s.ravel() for s in scores])
    keep = round((1 - sparsity) * flat.size)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    parts = np.split(mask, np.cumsum([s.size for s in scores])[:-1])
    return [m.reshape(s.shape) for m, s in zip(parts, scores, strict=True)]


def check(masks, scores, sparsity):
    for got, wanted in zip(kernels(masks), best(scores, sparsity), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert all(isinstance(masks[n]["bias"], optax.MaskedNode) for n in masks)


def test_csti_links_features_that_correlate():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    x[:, 4] = 2.5  # a feature that is always the same correlates with none
    params = make_params((6, 12, 6, 4))
    masks = at_init.csti(None, params, jnp.asarray(x, jnp.float32).reshape(40, 2, 3), 0.8, KEY)
    with np.errstate(invalid="ignore"):
        links = np.abs(np.nan_to_num(np.corrcoef(x.T)))
    np.fill_diagonal(links, 0)
    random = dstee.init_masks(params, 0.8, KEY)
    for name, (a, b) in {"l00": (1, 2), "l01": (2, 1)}.items():
        got, n = np.asarray(masks[name]["kernel"]), int(random[name]["kernel"].sum())
        tiled = np.tile(links, (a, b))
        assert got.sum() == n
        assert tiled[got].min() >= tiled[~got].max() - 1e-6
        assert not got.reshape(a, 6, b, 6)[:, 4].any()
    np.testing.assert_array_equal(masks["l02"]["kernel"], random["l02"]["kernel"])
    assert isinstance(masks["l00"]["bias"], optax.MaskedNode)
    with pytest.raises(
        ValueError, match=r"no kernel has two axes that are multiples of the 5 .* 5 units wide"
    ):
        at_init.csti(None, params, jnp.ones((3, 5)), 0.8, KEY)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.93])
def test_magnitude(sparsity):
    params = make_params()
    check(
        at_init.magnitude(None, params, None, sparsity),
        [abs(w) for w in kernels(params)],
        sparsity,
    )


@pytest.mark.parametrize("sparsity", [0.4, 0.9])
def test_snip(sparsity):
    """One linear layer with a squared loss: g = x^T (x w + b - y) / n."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.normal(size=(16, 9))
    params = {"l00": make_params()["l00"]}
    loss = lambda p, batch: 0.5 * ((network(p, batch[0]) - batch[1]) ** 2).sum() / 16  # noqa: E731
    w = kernels(params)[0]
    score = abs(w * (x.T @ (x @ w - y) / 16))
    check(at_init.snip(loss, params, (x, y), sparsity), [score], sparsity)


@pytest.mark.parametrize("sparsity", [0.4, 0.9])
def test_grasp(sparsity):
    """A quadratic loss w^T A w / 2 + b^T w: g = A w + b, H = A; removes the largest -w * A g."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 20))
    a, b = root @ root.T / 20, rng.normal(size=20)
    params = {"l0": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}}

    def loss(p, batch):
        w = p["l0"]["kernel"].reshape(-1)
        return 0.5 * w @ batch[0] @ w + batch[1] @ w

    batch = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    masks = at_init.grasp(loss, params, batch, sparsity)
    w = kernels(params)[0].ravel().astype(np.float64)
    removed = -w * (a @ (a @ w + b))
    check_only = np.argsort(removed, kind="stable")[: round((1 - sparsity) * 20)]
    assert set(np.flatnonzero(kernels(masks)[0].ravel())) == set(check_only)


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.8, 10), (0.9, 100)])
def test_synflow(sparsity, rounds):
    """A linear network in float64: the score is |w| times the flow into and out of it."""
    params = make_params()
    masks = at_init.synflow(
        network, params, jax.ShapeDtypeStruct((1, 6), jnp.float32), sparsity, rounds=rounds
    )
    weights = [abs(w).astype(np.float64) for w in kernels(params)]
    total = sum(w.size for w in weights)
    alive = [np.ones(w.shape, bool) for w in weights]
    for r in range(1, rounds + 1):
        now = [w * m for w, m in zip(weights, alive, strict=True)]
        into, out = [np.ones(6)], [np.ones(4)]
        for w in now[:-1]:
            into.append(into[-1] @ w)
        for w in reversed(now[1:]):
            out.append(w @ out[-1])
        scores = [
            np.where(m, i[:, None] * w * o, -1)
            for w, m, i, o in zip(now, alive, into, reversed(out), strict=True)
        ]
        keep = round(total * (round((1 - sparsity) * total) / total) ** (r / rounds))
        alive = best(scores, 1 - keep / total)
    for got, wanted in zip(kernels(masks), alive, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_synflow_never_empties_a_layer():
    params = make_params((8, *[30] * 11, 5))
    plain = at_init.synflow(network, params, jnp.ones((1, 8)), 0.998, rounds=2)
    params = jax.tree.map(lambda w: w * 2.0**10, params)  # 12 layers would overflow unscaled
    masks = at_init.synflow(network, params, jnp.ones((1, 8)), 0.998, rounds=2)
    jax.tree.map(np.testing.assert_array_equal, masks, plain)  # the ranking is the same
    counts = [int(m.sum()) for m in kernels(masks)]
    total = sum(w.size for w in kernels(params))
    assert min(counts) >= 1
    assert sum(counts) == round(0.002 * total)


def test_random_has_exact_counts():
    params = make_params()
    masks = at_init.random(None, params, None, 0.8, KEY)
    expected = dstee.init_masks(params, 0.8, KEY)
    for a, b in zip(kernels(masks), kernels(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_go_into_transform_and_stay():
    params = make_params()
    x, y = jnp.ones((4, 6)), jnp.zeros((4, 4))
    loss = lambda p, batch: ((network(p, batch[0]) - batch[1]) ** 2).sum()  # noqa: E731

    @jax.jit
    @jax.vmap
    def train(scale):  # traced masks, one set for each seed
        own = jax.tree.map(lambda w: w * (1 + scale * jnp.cos(w * 50)), params)
        masks = at_init.snip(loss, own, (x, y), 0.7)
        tx = dstee.methods.static(optax.sgd(0.01), masks=masks, total_steps=9, key=KEY)
        state = tx.init(own)
        own = dstee.apply_masks(own, state)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(own, (x, y)), state, own)
            own = optax.apply_updates(own, updates)
        return own, masks

    trained, masks = train(jnp.array([0.0, 0.5]))
    for w, m in zip(kernels(trained), kernels(masks), strict=True):
        assert not w[~m].any()
        assert (w[m] != 0).any()
    assert any((m[0] != m[1]).any() for m in kernels(masks))
    total = sum(w.size for w in kernels(params))
    assert [sum(m[s].sum() for m in kernels(masks)) for s in (0, 1)] == [round(0.3 * total)] * 2


def test_traced_masks_that_move_are_refused():
    def bad(mask):
        tx = dstee.transform(
            optax.sgd(0.1), masks={"kernel": mask}, total_steps=200, key=KEY, every=10
        )
        return tx.init({"kernel": jnp.ones((4, 4))})

    with pytest.raises(ValueError, match="masks= is traced"):
        jax.jit(bad)(jnp.ones((4, 4), bool))


LOSS = lambda p, batch: (network(p, batch) ** 2).sum()  # noqa: E731
X = jnp.ones((2, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: at_init.snip(None, p, X, 0.5), "at_init.snip needs a function: pass fn, the"),
        (lambda p: at_init.snip(LOSS, p, None, 0.5), "at_init.snip needs a batch"),
        (lambda p: at_init.grasp(LOSS, p, None, 0.5), "at_init.grasp needs a batch"),
        (lambda p: at_init.synflow(network, p, None, 0.5), "pass inputs of the right shape"),
        (lambda p: at_init.synflow(network, p, X, 0.5, rounds=0), "rounds=0 must be at least 1"),
        (lambda p: at_init.synflow(network, p, X, 0.99), "keeps 1 weights for 3 leaves"),
        (
            lambda p: at_init.synflow(lambda p, x: 0 * network(p, x), p, X, 0.5),
            "there is no path of non-zero weights",
        ),
        (lambda p: at_init.snip(lambda p, b: 0.0 * LOSS(p, b), p, X, 0.5), "all scores are zero"),
        (lambda p: at_init.snip(lambda p, b: LOSS(p, b) / 0, p, X, 0.5), "are not finite"),
        (lambda p: at_init.magnitude(None, p, None, 1.0), "sparsity is 1.0: it must be in"),
        (lambda p: at_init.magnitude(None, p, None, 0.9999), "keeps none of 145 weights"),
        (lambda p: at_init.magnitude(None, p, None, {"l0": 0.5}), "one number for all leaves"),
        (
            lambda p: at_init.magnitude(None, p, None, 0.5, where=lambda path, leaf: False),
            "where selects none of",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_params())
