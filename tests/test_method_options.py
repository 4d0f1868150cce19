"""The options of the methods are `transform`'s own, for the interpreter and for a type checker."""

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import optax
import pytest

import dstee_jax as dstee
from dstee_jax.methods._common import Options

KEY = jax.random.key(0)
OF_TRANSFORM = {
    name: parameter
    for name, parameter in inspect.signature(dstee.transform).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def test_the_keys_are_transforms_own():
    types = typing.get_type_hints(dstee.transform)
    assert typing.get_type_hints(Options) == {name: types[name] for name in OF_TRANSFORM}
    required = {name for name, p in OF_TRANSFORM.items() if p.default is p.empty}
    assert Options.__required_keys__ == required == {"total_steps", "key"}


@pytest.mark.parametrize("name", dstee.methods.__all__)
def test_every_method_takes_every_option_once(name):
    method = getattr(dstee.methods, name)
    (options,) = typing.get_args(typing.get_type_hints(method, include_extras=True)["options"])
    named = set(inspect.signature(method).parameters) - {"inner", "options"}
    rest = set(typing.get_type_hints(options))
    assert not named & rest
    assert rest <= set(OF_TRANSFORM) <= rest | named
    assert options.__required_keys__ | named >= {"total_steps", "key"}


@pytest.mark.parametrize("name", dstee.methods.__all__)
def test_a_typo_is_an_error_at_once(name):
    method = getattr(dstee.methods, name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'"):
        method(optax.sgd(0.1), sparsty=0.9, sparsity=0.9, total_steps=8000, key=KEY)


def test_options_override_the_methods_own():
    tx = dstee.methods.dst_ee(
        optax.sgd(0.1),
        grow=lambda leaf: 1 / 0,
        sparsity=0.5,
        total_steps=200,
        key=KEY,
    )
    params = {"kernel": jax.numpy.ones((4, 4))}
    with pytest.raises(ZeroDivisionError):
        tx.update(params, tx.init(params), params)


PROGRAM = """
import jax
import optax
import dstee_jax as dstee
from dstee_jax.scores import magnitude

sgd, key = optax.sgd(0.1), jax.random.key(0)
dstee.methods.rigl(sgd, sparsity=0.9, total_steps=1000, key=key, drop=magnitude())
dstee.methods.gmp(sgd, sparsity={"a": 0.9}, total_steps=1000, key=key, stop=0.5)
dstee.methods.mest_ems(sgd, sparsity=0.9, total_steps=1000, key=key, every=10)
dstee.methods.rigl(sgd, sparsty=0.9, total_steps=1000, key=key)
dstee.methods.granet(sgd, sparsity="0.9", total_steps=1000, key=key)
dstee.methods.set(sgd, sparsity=0.9, key=key)
"""


def test_mypy_finds_typos_types_and_what_is_missing(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM.lstrip())
    checker = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*checker, "--ignore-missing-imports", "--follow-imports=silent", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 3, done.stdout + done.stderr
    for line, error, message in zip(
        (10, 11, 12),
        errors,
        ('Unexpected keyword argument "sparsty"', 'Argument "sparsity"', '"total_steps" for "set"'),
        strict=True,
    ):
        assert error.startswith(f"program.py:{line}: ")
        assert message in error
