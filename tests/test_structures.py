"""N:M, tiles and constant fan-in: hand-worked exchanges, and structure kept under any rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import scores, structures
from dstee_jax.engine.rule import Rule
from dstee_jax.masks.counts import LeafSpec
from dstee_jax.selection.exchange import Exchange
from dstee_jax.selection.exchange import exchange as exchange_all
from dstee_jax.trees import expanded

KEY = jax.random.key(0)
CASES = {
    "2:4": (structures.n_m(2, 4), 0.5, dstee.uniform),
    "1:8 of outputs": (structures.n_m(1, 8, axis=-1), 0.875, dstee.uniform),
    "tiles": (structures.tiles((2, 4)), 0.5, dstee.erk),
    "channels": (structures.tiles((2, 1)), 0.5, dstee.erk),
    "fan-in": (structures.constant_fan_in(), 0.8, dstee.erk),
}


def has_structure(name, mask):
    """The definitions, with loops."""
    flat = mask.reshape(-1, *mask.shape[-2:])
    if name == "2:4":
        return all((flat[:, i : i + 4].sum(1) == 2).all() for i in range(0, flat.shape[1], 4))
    if name == "1:8 of outputs":
        return all((flat[..., i : i + 8].sum(-1) == 1).all() for i in range(0, flat.shape[2], 8))
    if name in ("tiles", "channels"):
        inputs, outputs = (2, 4) if name == "tiles" else (2, 1)
        rows, columns = range(0, flat.shape[1], inputs), range(0, flat.shape[2], outputs)
        parts = [[flat[:, i : i + inputs, j : j + outputs] for i in rows] for j in columns]
        whole = all(p.all() == p.any() for column in parts for p in column)
        return whole and len({sum(p.any() for p in column) for column in parts}) == 1
    return len(set(mask.reshape(-1, mask.shape[-1]).sum(0).tolist())) == 1


@pytest.mark.parametrize("grow", [scores.gradient(), scores.random(), scores.acquisition()])
@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_structure_holds_while_weights_move(name, regrow, grow):
    structure, sparsity, distribution = CASES[name]
    params = {"conv": {"kernel": jax.random.normal(KEY, (3, 3, 8, 16))}}
    tx = dstee.transform(
        optax.sgd(0.1),
        sparsity=sparsity,
        distribution=distribution,
        total_steps=40,
        key=KEY,
        every=4,
        structure=structure,
        grow=grow,
        regrow=regrow,
    )
    state, update = tx.init(params), jax.jit(tx.update)

    def mask_of(state):
        return np.asarray(expanded(state.masks["conv"]["kernel"], (3, 3, 8, 16)))

    first = mask_of(state)
    for step in range(40):
        grads = {"conv": {"kernel": jax.random.normal(jax.random.key(step), (3, 3, 8, 16))}}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        mask = mask_of(state)
        assert has_structure(name, mask)
        assert mask.sum() == first.sum()
        assert not np.asarray(params["conv"]["kernel"])[~mask].any()
    assert regrow or (mask != first).any()  # of few tiles, the one that was dropped may come back
    assert structure.fits(mask)
    assert not structure.fits(mask ^ (np.arange(mask.size).reshape(mask.shape) == 0))


def exchange(structure, mask, drop, grow, k, regrow=False):
    arrays = jnp.array(mask, bool), jnp.array(drop, float), jnp.array(grow, float)
    rule = Rule(None, None, None, structure, regrow, "new", "auto")
    active = int(arrays[0].sum())
    spec = LeafSpec(active, active, (1,) * arrays[0].ndim, ())
    row = Exchange(*arrays, spec.grid, jnp.int32(k), None, k)
    if rule.searches_alone:
        return np.asarray(rule.exchange_alone(row, spec, "kernel")).astype(int).tolist()
    (new,) = exchange_all([rule.reduce(row, spec, jnp.int32(0))], regrow=regrow, selection="auto")
    return np.asarray(rule.expand(new, row, spec)).astype(int).tolist()


def test_one_exchange_by_hand():
    column = np.vstack
    # Two groups of 4 inputs for one output. Group 1 has the weakest active weight (0.1).
    mask = column([1, 1, 0, 0, 1, 1, 0, 0])
    drop = column([5, 3, 0, 0, 0.1, 2, 0, 0])
    grow = column([9, 9, 7, 8, 9, 9, 1, 2])
    two_four = structures.n_m(2, 4)
    assert np.ravel(exchange(two_four, mask, drop, grow, 1)).tolist() == [1, 1, 0, 0, 0, 1, 0, 1]
    assert np.ravel(exchange(two_four, mask, drop, grow, 5)).tolist() == [1, 0, 0, 1, 0, 1, 0, 1]
    # With regrowth the weak weight comes back if its own grow score is the best: 9 against 2.
    again = exchange(two_four, mask, drop, grow, 1, regrow=True)
    assert np.ravel(again).tolist() == np.ravel(mask).tolist()

    # Tiles of two inputs: sums 8 and 0.5 for dropping, 1 and 9 for growing.
    mask, drop = column([1, 1, 0, 0, 1, 1, 0, 0]), column([5, 3, 0, 0, 0.1, 0.4, 0, 0])
    grow = column([0, 0, 0.5, 0.5, 0, 0, 8, 1])
    pairs = structures.tiles((2, 1))
    assert np.ravel(exchange(pairs, mask, drop, grow, 2)).tolist() == [1, 0, 0, 1]

    # Two units of fan-in 2 out of 3: each drops its own weakest and grows its own best.
    mask = [[1, 0], [1, 1], [0, 1]]
    drop, grow = [[1, 0], [2, 5], [0, 4]], [[0, 6], [0, 0], [3, 0]]
    fan_in = structures.constant_fan_in()
    assert exchange(fan_in, mask, drop, grow, 2) == [[0, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("k", [0, 1, 3, 7, 8, 13, 40])
def test_what_units_exchange_adds_up_to_what_is_asked(k):
    """8 units of 4 active weights each exchange k in all, at most 3 each; each has its turn."""
    parts = structures.constant_fan_in().parts
    shares = np.array([parts((16, 8), jnp.int32(k), k, 32, jnp.int32(t))[1] for t in range(64)])
    assert (shares.sum(1) == min(k, 24)).all()
    assert shares.max() - shares.min() <= 1
    if 0 < k < 24:
        turns = shares.sum(0)
        assert turns.max() <= 1.5 * turns.min()
    tiles = structures.tiles((2, 1))  # 3 weights are a tile and a half; less than a tile is one
    shares = tiles.parts((16, 8), jnp.int32(k), k, 64, jnp.int32(1))[1]
    assert shares.sum() == min(max(k // 2, int(k > 0)), 24)


@pytest.mark.parametrize("structure", [structures.tiles((4, 4)), structures.constant_fan_in()])
def test_no_unit_loses_all_its_weights(structure):
    """A round that drops the only tile of each column, or the only input, would empty a layer."""
    kernel = jax.random.normal(KEY, (16, 16))
    options = {"total_steps": 40, "every": 4, "drop_fraction": 0.9, "key": KEY}
    for sparsity in (0.5, 0.75, 15 / 16):
        tx = dstee.transform(
            optax.sgd(0.1), sparsity=sparsity, structure=structure, grow=scores.random(), **options
        )
        state, params = tx.init({"kernel": kernel}), {"kernel": kernel}
        params = dstee.apply_masks(params, state)
        for _ in range(4):
            params, state = dstee.apply(tx, jax.tree.map(jnp.ones_like, params), state, params)
        assert (params["kernel"] != 0).any(0).all()


PARAMS = {"kernel": jnp.ones((6, 8))}
MAKE = dict(sparsity=0.5, total_steps=300, key=KEY, distribution=dstee.uniform)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: structures.n_m(4, 4), "4:4 is no N:M structure"),
        (lambda: structures.tiles((4,)), r"tiles=\(4,\) must be two sizes"),
        (
            lambda: dstee.transform(structure=structures.n_m(2, 4), **MAKE).init(PARAMS),
            r"2:4 needs axis -2 of shape \(6, 8\) to be a multiple of 4",
        ),
        (
            lambda: dstee.transform(
                structure=structures.n_m(1, 2), **(MAKE | {"sparsity": 0.9})
            ).init(PARAMS),
            "1:2 keeps 24 weights .* pass sparsity=0.5 and distribution=dstee.uniform",
        ),
        (
            lambda: dstee.transform(structure=structures.tiles((4, 4)), **MAKE).init(PARAMS),
            r"kernel: tiles of \(4, 4\) do not divide the last two axes of shape \(6, 8\): choose",
        ),
        (
            lambda: dstee.methods.gmp(structure=structures.n_m(2, 4), **MAKE),
            "structure= keeps the count of every leaf",
        ),
        (
            lambda: dstee.transform(
                masks={"kernel": jnp.eye(4, dtype=bool).at[0, 1].set(True)},
                structure=structures.constant_fan_in(),
                total_steps=300,
                key=KEY,
            ).init({"kernel": jnp.ones((4, 4))}),
            "the mask given for kernel does not have the structure",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
