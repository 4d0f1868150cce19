"""The state as other people's serializers take it: plain arrays, whole again bit for bit."""

import dataclasses
import functools
import io
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import FrozenDict
from jax import export

import dstee_jax as dstee
from dstee_jax import exporting
from dstee_jax.state import wrap_key
from experiments.training.checkpoints import Checkpoints

PARAMS = {"kernel": jnp.linspace(-1, 1, 96).reshape(8, 12), "bias": jnp.zeros(12)}
KEYS = {
    "threefry": lambda: jax.random.key(3),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
    "legacy": lambda: jax.random.PRNGKey(3),
}


def make(key=None, **options):
    settings = {"sparsity": 0.75, "total_steps": 40, "every": 3, "regrow": True} | options
    key = KEYS["threefry"]() if key is None else key
    return dstee.methods.snfs(optax.adam(1e-2), key=key, grow=dstee.scores.random(), **settings)


@functools.cache
def program(tx):
    return jax.jit(functools.partial(dstee.apply, tx))


def train(tx, params, state, steps):
    for step in steps:
        noise = jax.random.normal(jax.random.key(step), (8, 12))
        grads = {"kernel": noise + params["kernel"], "bias": jnp.ones(12)}
        params, state = program(tx)(grads, state, params)
    return params, state


def started(tx):
    state = tx.init(PARAMS)
    return train(tx, dstee.apply_masks(PARAMS, state), state, range(4))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def by_flax(state, like, folder):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def by_equinox(state, like, folder):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


def by_numpy(state, like, folder):
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))


def by_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "state", state)
        saver.wait_until_finished()
        return saver.restore(folder / "state", like)


@pytest.mark.parametrize("how", [by_flax, by_equinox, by_numpy, by_orbax])
@pytest.mark.parametrize("kind", KEYS)
def test_a_restored_state_trains_on_bit_for_bit(kind, how, tmp_path):
    tx = make(KEYS[kind]())
    params, state = started(tx)
    again = how(state, tx.init(PARAMS), tmp_path)
    equal(again, state)
    equal(train(tx, params, again, range(4, 11)), train(tx, params, state, range(4, 11)))


@pytest.mark.parametrize("kind", KEYS)
def test_random_streams_are_those_of_the_key(kind):
    key = KEYS[kind]()
    seen = []

    def spy(leaf):
        seen.append(leaf.key)
        return dstee.scores.random()(leaf)

    tx = dstee.transform(
        optax.sgd(0.1), sparsity=0.75, total_steps=40, every=3, update_weights=True, key=key,
        drop=dstee.scores.magnitude(), grow=spy,
    )  # fmt: skip
    state = tx.init(PARAMS)
    assert state.key.dtype == jnp.uint32
    typed = jax.random.wrap_key_data(key) if kind == "legacy" else key
    np.testing.assert_array_equal(state.key, jax.random.key_data(typed))
    params = dstee.apply_masks(PARAMS, state)
    with jax.disable_jit():
        for _ in range(3):
            params, state = dstee.apply(tx, PARAMS, state, params)
    of_leaf = jax.random.fold_in(jax.random.fold_in(typed, 3), sorted(PARAMS).index("kernel"))
    of_growth = jax.random.fold_in(of_leaf, 1)
    assert jax.random.key_impl(seen[-1]) == jax.random.key_impl(typed)
    np.testing.assert_array_equal(jax.random.key_data(seen[-1]), jax.random.key_data(of_growth))


@pytest.mark.parametrize("kind", ["threefry", "rbg"])
def test_a_state_with_a_typed_key_trains_on(kind):
    """As checkpoints from before the raw key hold it."""
    tx = make(KEYS[kind]())
    params, state = started(tx)
    typed = state._replace(key=wrap_key(state.key, KEYS[kind]()))
    expected, _ = train(tx, params, state, range(4, 11))
    new, after = train(tx, params, typed, range(4, 11))
    equal(new, expected)
    assert jnp.issubdtype(after.key.dtype, jax.dtypes.prng_key)

    def body(carry, _):
        params, state = carry
        return dstee.apply(tx, params, state, params), None

    carry, _ = jax.jit(lambda *c: jax.lax.scan(body, c, length=5))(params, typed)
    plain, _ = jax.jit(lambda *c: jax.lax.scan(body, c, length=5))(params, state)
    equal(carry[0], plain[0])
    assert carry[1].key.dtype == typed.key.dtype


@pytest.mark.parametrize("kind", ["threefry", "rbg"])
def test_checkpoints_with_typed_keys_are_read(kind, tmp_path):
    tx = make(KEYS[kind]())
    params, state = started(tx)
    old = state._replace(key=wrap_key(state.key, KEYS[kind]()))
    store = Checkpoints(tmp_path, keep=False)
    store.save(4, {"params": params, "opt_state": old}, {"epoch": 1})
    like = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    restored, notes = Checkpoints(tmp_path, keep=True).restore(like)
    assert notes == {"epoch": 1}
    equal(restored, {"params": params, "opt_state": state})
    equal(
        train(tx, restored["params"], restored["opt_state"], range(4, 11)),
        train(tx, params, state, range(4, 11)),
    )


def test_checkpoints_of_today_are_read(tmp_path):
    tx = make()
    params, state = started(tx)
    store = Checkpoints(tmp_path, keep=False)
    store.save(4, (params, state), {})
    equal(store.restore((PARAMS, tx.init(PARAMS)))[0], (params, state))


# ------------------------------------------------------------------------- jax.export

INNERS = {
    "adam": optax.adam(1e-2),
    "masked": optax.masked(optax.sgd(0.1, momentum=0.9), {"kernel": True, "bias": False}),
    "by label": optax.multi_transform(
        {"a": optax.adamw(1e-2), "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
    ),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 40)),
}
IN_A_NEW_PROCESS = """
import sys
import jax, numpy as np, optax
import dstee_jax as dstee
from jax import export
from tests.test_serialization import INNERS, PARAMS, exported, of
name, folder = sys.argv[1:]
tx = of(name)
opt_state = tx.init(PARAMS)
dstee.register_for_export(opt_state)
with open(folder + "/program", "rb") as file:
    program = export.deserialize(file.read())
params, opt_state = program.call(PARAMS, opt_state, PARAMS)
np.savez(folder + "/out.npz", *map(np.asarray, jax.tree.leaves((params, opt_state))))
"""


def of(name):
    return dstee.methods.rigl(
        INNERS[name], sparsity=0.75, total_steps=40, every=3, key=jax.random.key(0)
    )


def exported(tx):
    def three(grads, state, params):
        for _ in range(3):
            params, state = dstee.apply(tx, grads, state, params)
        return params, state

    return jax.jit(three)


@pytest.mark.parametrize("name", INNERS)
def test_an_exported_step_runs_in_a_new_process(name, tmp_path):
    tx = of(name)
    state = tx.init(PARAMS)
    dstee.register_for_export(state)
    dstee.register_for_export(state)  # again: nothing changes
    step = exported(tx)
    (tmp_path / "program").write_bytes(export.export(step)(PARAMS, state, PARAMS).serialize())
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, name, str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    with np.load(tmp_path / "out.npz") as found:
        for x, y in zip(jax.tree.leaves(step(PARAMS, state, PARAMS)), found.values(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)  # compiled with LLVM's optimisations


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Momentum:
    """State of an optimizer that is a dataclass with a static field."""

    trace: Any
    name: Any = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize("tree", [Momentum(jnp.ones(2), "a"), FrozenDict(b=jnp.ones(2))])
def test_other_nodes_are_registered(tree):
    dstee.register_for_export({"state": (tree, None)})
    program = export.export(jax.jit(lambda x: x))({"state": (tree, None)})
    again = export.deserialize(program.serialize())
    assert again.in_tree == program.in_tree
    equal(again.call({"state": (tree, None)}), {"state": (tree, None)})


def test_static_fields_that_are_no_literals_are_refused():
    state = Momentum(jnp.ones(2), object())
    dstee.register_for_export(state)
    with pytest.raises(ValueError, match=r"Momentum has the static fields .*object.*register"):
        export.export(jax.jit(lambda x: x.trace))(state).serialize()


def test_two_types_of_one_name_are_refused():
    def another():
        class Twin(NamedTuple):
            x: jax.Array

        return Twin

    exporting.register(another())
    with pytest.raises(ValueError, match="Duplicate serialization registration"):
        exporting.register(another())
