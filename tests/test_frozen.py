"""The recipe of docs/optimizers.md for a layer that is not trained."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def test_a_frozen_layer_is_untouched():
    text = PAGE.read_text().split("## Freezing a layer")[1]
    (block,) = re.findall(r"```python\n(.*?)```", text.split("\n## ")[0], re.DOTALL)
    namespace = {}
    exec(compile(block, str(PAGE), "exec"), namespace)
    tx = namespace["tx"]

    keys = jax.random.split(jax.random.key(1), 4)
    params = {
        "backbone": {"kernel": jax.random.normal(keys[0], (16, 24)), "bias": jnp.ones(24)},
        "head": {"kernel": jax.random.normal(keys[1], (24, 8)), "bias": jnp.ones(8)},
    }
    x, y = jax.random.normal(keys[2], (32, 16)), jax.random.normal(keys[3], (32, 8))
    state = tx.init(params)
    first = params = dstee.apply_masks(params, state)
    assert first["backbone"]["kernel"].all()  # apply_masks leaves it whole

    def loss_fn(params):
        layer = params["backbone"]
        hidden = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    masks = state.masks
    for _ in range(210):  # two mask steps
        params, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, params["backbone"], first["backbone"])
    assert not jnp.array_equal(params["head"]["bias"], first["head"]["bias"])
    assert not jnp.array_equal(state.masks["head"]["kernel"], masks["head"]["kernel"])
    assert int(state.masks["head"]["kernel"].sum()) == 20  # 10% of 192, rounded up
    assert isinstance(state.masks["backbone"]["kernel"], optax.MaskedNode)
    assert float(loss_fn(params)) < float(loss_fn(first))


def test_a_frozen_layer_that_is_sparse_is_warned_about():
    """As the program shows: also behind a chain, and only where a mask step is in the program."""
    labels = {"backbone": "frozen", "head": "trained"}
    inner = optax.multi_transform(
        {"frozen": optax.set_to_zero(), "trained": optax.sgd(0.1)}, labels
    )
    options = {"sparsity": 0.5, "total_steps": 200, "key": jax.random.key(0)}
    params = {name: {"kernel": jnp.ones((8, 8))} for name in labels}
    for optimizer in (inner, optax.chain(optax.clip_by_global_norm(1.0), inner)):
        tx = dstee.transform(optimizer, **options)
        state = tx.init(params)
        with pytest.warns(UserWarning, match=r"never updates \['backbone/kernel'\].*where="):
            jax.jit(tx.update).lower(params, state, params)
        jax.jit(tx.update, static_argnames="mask_step").lower(
            params, state, params, mask_step=False
        )
    fixed = dstee.methods.static(inner, **options)
    jax.jit(fixed.update).lower(params, fixed.init(params), params)
