"""The Python blocks of README and pages run, in order, as a reader would run them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dstee_jax as dstee
from experiments.report import table

README = Path(__file__).parent.parent / "README.md"
SUFFIXES = (".py", ".md", ".txt", ".ipynb")


def blocks_of(path):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run_blocks(path, namespace=None):
    """Run the blocks of a page in order, as a reader would; returns their names."""
    namespace = {} if namespace is None else namespace
    for block in blocks_of(path):
        exec(compile(block, str(path), "exec"), namespace)
    return namespace


def test_python_blocks_run(capsys):
    assert len(blocks_of(README)) == 3
    namespace = run_blocks(README)
    nnx_model, optax_alone = capsys.readouterr().out.split("leaf ")[1:]
    assert "layers/0/kernel" in nnx_model
    assert "23,820" in nnx_model  # 10% of 784 * 300 + 300 * 10
    assert "11,760" in optax_alone  # 5% of 784 * 300
    assert namespace["opt_state"].count == 3
    model, optimizer = namespace["model"], namespace["optimizer"]
    # 3.2 of 32 tiles in a column, rounded: 3, with their 96 inputs
    assert model.layers[0].kernel.shape == (32, 96, 32)
    assert int(dstee.get_state(optimizer.opt_state).count) == 3


@pytest.mark.parametrize("page", ["recipes", "getting_started", "write_a_method", "resume"])
def test_blocks_of_a_guide_run(page, capsys):
    path = README.parent / "docs" / f"{page}.md"
    assert len(blocks_of(path)) > 1
    run_blocks(path)
    for label, shown in re.findall(r"([\w ,%-]+): ([\d.]+)%", capsys.readouterr().out):
        assert float(shown) > (85 if "at once" not in label and "pruned" not in label else 20), (
            label
        )


def test_tables_of_the_results_page_are_what_the_commands_print(capsys):
    page = README.parent / "docs" / "results.md"
    for name in ("digits", "cifar"):
        table.main([str(README.parent / "results" / f"{name}.jsonl"), "--pairs"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 30
    assert set(lines) <= set(page.read_text().splitlines())


def test_commands_name_modules_that_exist():
    folders = [README.parent / name for name in ("experiments", "benchmarks", "docs")]
    files = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in SUFFIXES]
    files = [path for path in files if "_build" not in path.parts]
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
    parallel, sharded, two_programs = blocks_of(page)
    namespace = {}
    exec(compile(parallel, str(page), "exec"), namespace)
    assert int(namespace["opt_state"].count) == 3
    assert namespace["opt_state"].inner_state[0].mu["kernel"].size == 11760
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
    namespace = run_blocks(page)
    params = {"kernel": jnp.ones((16, 8))}
    assert int(namespace["two_in_four"].init(params).masks["kernel"].sum()) == 64
    assert int(namespace["momentum_gmp"].init(params).masks["kernel"].sum()) == 64


def test_blocks_of_the_jaxpruner_page_run(capsys):
    page = README.parent / "docs" / "from_jaxpruner.md"
    namespace = run_blocks(page)
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
    pays, training, comparison, candidates, inference = blocks_of(page)
    small = {
        "(256, 1024)": "(8, 64)",
        "(1024, 1024)": "(64, 64)",
        "(32, 32)": "(8, 8)",
        "1024, 256, 32, 400, 100": "64, 32, 4, 160, 40",
        "sparsity=0.9,": "sparsity=0.75,",
    }
    assert all(as_printed in pays + training for as_printed in small)
    namespace = {}
    for block in (pays, training, comparison, candidates, inference):
        for as_printed, here in small.items():
            block = block.replace(as_printed, here)
        exec(compile(block, str(page), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "speedup=" in printed
    assert "times as fast, mask steps included" in printed
    losses = re.findall(r"(\w+)_step: loss ([\d.]+) to ([\d.]+), [\d.]+ ms a step", printed)
    assert [name for name, _, _ in losses] == ["tiled", "dense", "candidates"]
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
