"""The rooms of the packages: public names stay, arrows point down, and the wheel holds it all.

`python -m tests.test_rooms` prints what each room imports.
"""

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dstee_jax as dstee

ROOT = Path(__file__).parent.parent

# What users import: the room of the module that it shows, and a name in it.
PUBLIC = {
    "at_init": ("masks", "snip"),
    "distributions": ("masks", "erk"),
    "inclusion": ("masks", "sparsify"),
    "memory": ("rules", "dense_momentum"),
    "penalties": ("rules", "l1_with_noise"),
    "plans": ("rules", "exchange"),
    "scales": ("rules", "warm_up"),
    "scores": ("rules", "magnitude"),
    "structures": ("rules", "n_m"),
    "powerpropagation": ("reparameterised", "apply"),
    "soft_threshold": ("reparameterised", "apply"),
    "straight_through": ("reparameterised", "apply"),
    "top_kast": ("reparameterised", "apply"),
}

# From the ground up: a room imports rooms of lower floors alone, and none of its own floor.
FLOORS = {
    "dstee_jax": [
        ["arguments", "selection", "trees"],
        ["state"],
        ["rules", "tiling"],
        ["masks"],
        ["engine"],
        ["devices", "files", "inference", "measure", "reparameterised", "tiled_linen", "tiled_nnx"],
        ["exporting", "transform"],
        ["methods"],
        [name for name, (behind, _) in PUBLIC.items() if behind],
        ["__init__"],
        ["__main__"],
    ],
    "experiments": [
        ["data", "training"],
        ["cifar", "imagenet", "linkpred", "lm", "mlp", "pack", "quickstart"],
        ["studies"],
        ["report"],
        ["__init__"],
    ],
}

DOCTESTS = 15  # before the modules moved into rooms


def sources(package):
    """Every module of a package in the checkout: its dotted name, and its file."""
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def room(name):
    """The room of a module: what follows the package in its name."""
    return (*name.split("."), "__init__")[1]


def imports(package):
    """What each room imports from the other rooms of its package."""
    modules = dict(sources(package))
    found = {room(name): set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports by dots: write the whole name"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in modules else node.module for target in whole]
            else:
                continue
            inside = [target for target in targets if target.split(".")[0] == package]
            found[room(name)].update(map(room, inside))
    return {name: rooms - {name} for name, rooms in found.items()}


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package):
    floor = {name: i for i, names in enumerate(FLOORS[package]) for name in names}
    arrows = imports(package)
    assert set(arrows) == set(floor), "a room is missing in FLOORS, or gone"
    up = [(a, b) for a, rooms in arrows.items() for b in rooms if floor[b] >= floor[a]]
    assert not up, f"rooms that import from their own floor or above: {up}"


def test_the_package_names_the_pythons_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.rsplit(" ", 1)[1] for line in project["classifiers"] if ":: 3." in line}
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert named == set(re.findall(r'python: "([\d.]+)"', workflow))
    assert project["requires-python"] == ">=" + min(named, key=lambda v: int(v.split(".")[1]))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_have_three_forms(name):
    behind, something = PUBLIC[name]
    attribute = getattr(dstee, name)
    namespace = {}
    exec(f"import dstee_jax.{name}\nfrom dstee_jax.{name} import {something}", namespace)
    assert getattr(namespace["dstee_jax"], name) is attribute
    assert namespace[something] is getattr(attribute, something)
    assert name in dstee.__all__
    if behind:
        module = importlib.import_module(f"dstee_jax.{behind}.{name}")
        defined = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
        assert something in defined
        assert all(getattr(attribute, key) is value for key, value in defined.items())


def test_everything_in_all_is_there():
    assert all(hasattr(dstee, name) for name in dstee.__all__)
    assert sorted(dstee.__all__) == dstee.__all__


def test_as_many_doctests_run_as_before():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name, _ in sources("dstee_jax")]
    found = [test for module in modules for test in finder.find(module) if test.examples]
    assert len({test.name for test in found}) >= DOCTESTS


CHECK = """
import importlib, pathlib, sys
import dstee_jax
home = pathlib.Path(dstee_jax.__file__).parent
assert home == pathlib.Path(sys.argv[1]) / "dstee_jax", home
assert (home / "py.typed").is_file()
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(home), module
print(len(sys.argv[2:]))
"""


def test_the_wheel_has_every_module(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(
        ROOT / "dstee_jax", source / "dstee_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    names = [name for name, _ in sources("dstee_jax")]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, site, *names],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names) > 30


if __name__ == "__main__":
    for package, floors in FLOORS.items():
        arrows = imports(package)
        for name in [name for floor in reversed(floors) for name in floor]:
            print(f"{package}.{name} -> {', '.join(sorted(arrows[name])) or 'nobody'}")
