"""Programs outside the library import its public names alone."""

import ast
import json
import re
from pathlib import Path

import pytest

import dstee_jax as dstee

ROOT = Path(__file__).parent.parent
MODULES = {
    *("at_init", "distributions", "inclusion", "memory", "methods", "penalties", "plans"),
    *("powerpropagation", "scales", "scores", "soft_threshold", "straight_through", "structures"),
    *("top_kast", "trees"),
}
OPTIONAL = {"tiled_linen", "tiled_nnx"}  # which need Flax, and are imported by their names


def programs():
    """Name and code of each program: files, the notebooks' cells, the blocks of the pages."""
    for folder in ("experiments", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            cells = json.loads(path.read_text())["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            yield str(path.relative_to(ROOT)), "\n".join(code)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        yield str(path.relative_to(ROOT)), "\n".join(blocks)


def wrong_names(code):
    """What a program takes from the library that is not public."""
    known, wrong = {"dstee": ""}, []  # modules of the library by the names that the program uses

    def check(module, name):
        inside = name.startswith("_") or (not module and name not in dstee.__all__)
        if inside or (module and module not in MODULES | OPTIONAL):
            wrong.append(f"{module}.{name}".removeprefix("."))

    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, module = alias.name.partition(".")
                if top == "dstee_jax":
                    known[alias.asname or top] = module if alias.asname else ""
                    wrong += [module] if module and module not in MODULES | OPTIONAL else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dstee_jax":
            module = node.module.partition(".")[2]
            for alias in node.names:
                check(module, alias.name)
                if not module and alias.name in MODULES:
                    known[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        of = node.value
        if isinstance(of, ast.Name) and of.id in known:
            check(known[of.id], node.attr)
        elif isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name):
            if known.get(of.value.id) == "" and of.attr in MODULES:
                check(of.attr, node.attr)
    return wrong


def test_programs_take_public_names_alone():
    wrong = {name: wrong_names(code) for name, code in programs()}
    assert {"experiments/cifar.py", "benchmarks/timing.py", "README.md"} <= wrong.keys()
    assert "experiments/notebooks/tour.ipynb" in wrong
    assert {name: names for name, names in wrong.items() if names} == {}


def test_public_modules_exist_and_have_what_is_taken():
    assert set(dstee.__all__) >= MODULES
    for module in MODULES:
        assert getattr(dstee, module).__name__ in (f"dstee_jax.{module}", "dstee_jax.methods")


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import dstee_jax as dstee\ndstee.transform; dstee.scores.magnitude", []),
        ("from dstee_jax import scores, transform\nscores.gradient()", []),
        ("from dstee_jax.distributions import active_counts", []),
        ("import dstee_jax.scores as s\ns.magnitude", []),
        ("from dstee_jax.tiled_nnx import Linear", []),
        ("from dstee_jax.tiled_nnx import _layers", ["tiled_nnx._layers"]),
        ("import dstee_jax as d\nd.make_rounds", ["make_rounds"]),
        ("import dstee_jax\ndstee_jax.engine.round", ["engine"]),
        ("import dstee_jax.engine.step", ["engine.step"]),
        ("from dstee_jax.masks.random import random_mask", ["masks.random.random_mask"]),
        ("from dstee_jax import devices", ["devices"]),
        ("from dstee_jax import scores as s\ns._clip", ["scores._clip"]),
        ("import dstee_jax as dstee\ndstee.methods._common", ["methods._common"]),
        ("import dstee_jax as dstee\ndstee._x", ["_x"]),
    ],
)
def test_wrong_names_are_found(code, wrong):
    assert wrong_names(code) == wrong
