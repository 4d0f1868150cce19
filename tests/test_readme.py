"""The README's Python blocks run, in order, as a reader would run them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dstee_jax as dstee

README = Path(__file__).parent.parent / "README.md"
SUFFIXES = (".py", ".md", ".txt", ".ipynb")


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "kernel" in printed
    assert "11,760" in printed  # 5% of 784 * 300
    tx, params = namespace["tx"], namespace["params"]
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["kernel"].shape == (784, 300)
    assert int(state.count) == 1


def test_commands_name_modules_that_exist():
    folders = [README.parent / name for name in ("experiments", "benchmarks", "docs")]
    files = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in SUFFIXES]
    named = set()
    for path in [README, README.parent / "CHANGELOG.md", *files]:
        text = re.sub(r"\s+", " ", path.read_text())
        named |= set(re.findall(r"python3? -m ((?:experiments|benchmarks)[.\w]*\w)", text))
    assert len(named) > 20
    for name in named:
        path = README.parent / name.replace(".", "/")
        assert path.with_suffix(".py").exists(), name


def test_blocks_of_the_scaling_page_run():
    page = README.parent / "docs" / "scaling.md"
    sharded, two_programs = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace = {}
    exec(compile(two_programs, str(page), "exec"), namespace)
    assert int(namespace["opt_state"].count) == 300
    assert int(namespace["opt_state"].counters["kernel"].max()) == 3  # the first mask, two rounds
    namespace = {}
    exec(compile(sharded, str(page), "exec"), namespace)
    params, state = namespace["params"], namespace["opt_state"]
    for x in (params["kernel"], state.masks["kernel"], state.inner_state[0].mu["kernel"]):
        assert len(x.sharding.device_set) == 8
        assert x.addressable_shards[0].data.shape[0] == x.shape[0] // 8


def test_blocks_of_the_methods_page_run():
    page = README.parent / "docs" / "methods.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    params = {"kernel": jnp.ones((16, 8))}
    assert int(namespace["two_in_four"].init(params).masks["kernel"].sum()) == 64
    assert int(namespace["momentum_gmp"].init(params).masks["kernel"].sum()) == 64


@pytest.mark.usefixtures("quick_compilation")
def test_blocks_of_the_jaxpruner_page_run(capsys):
    page = README.parent / "docs" / "from_jaxpruner.md"
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)
    assert "hidden/kernel" in capsys.readouterr().out
    assert dstee.density(namespace["opt_state"]) == jnp.float32(103 / 512)
    assert (namespace["ste_grads"]["hidden"]["kernel"] != 0).all()
    params = namespace["params"]
    assert int((params["hidden"]["kernel"] != 0).sum()) == 51
    named = namespace["algorithms"] | namespace["types"]
    named |= {name: namespace[name] for name in ("one_shot", "linear", "custom")}
    for tx in named.values():
        state = tx.init(params)
        updates, _ = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    state = dstee.get_state(named["channel_-1"].init(params))
    assert state.masks["hidden"]["kernel"].all(0).sum() == 16


def test_blocks_of_the_speed_page_run(capsys):
    page = README.parent / "docs" / "speed.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    pays, training, comparison, inference = blocks
    small = {
        "(256, 1024)": "(8, 64)",
        "(1024, 1024)": "(64, 64)",
        "(32, 32)": "(8, 8)",
        "1024, 256, 32, 400, 100": "64, 32, 4, 160, 40",
        "sparsity=0.9,": "sparsity=0.75,",
    }
    assert all(as_printed in pays + training for as_printed in small)
    namespace = {}
    for block in (pays, training, comparison, inference):
        for as_printed, here in small.items():
            block = block.replace(as_printed, here)
        exec(compile(block, str(page), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "speedup=" in printed
    assert "times as fast, mask steps included" in printed
    losses = re.findall(r"(\w+)_step: loss ([\d.]+) to ([\d.]+), [\d.]+ ms a step", printed)
    assert [name for name, _, _ in losses] == ["tiled", "dense"]
    assert all(float(last) < 0.8 * float(first) for _, first, last in losses)
    state = namespace["opt_state"]
    assert float(dstee.density(state)) == 0.25
    for layer, rectangle in zip(state.masks, namespace["tiled"], strict=True):
        assert layer["kernel"].sum(0).tolist() == [4] * 16
        assert rectangle["kernel"].shape == (16, 4 * 4, 4)
    assert int(state.counters[0]["kernel"].max()) > 1  # masks moved, and some tiles stayed
    assert namespace["dense_steps"] == {40, 80, 120}
    y = namespace["x"][:1]
    for i, layer in enumerate(namespace["dense"]):
        y = jnp.maximum(y, 0) @ layer["kernel"] if i else y @ layer["kernel"]
    assert jnp.allclose(namespace["y"], y, rtol=1e-3, atol=1e-4)
