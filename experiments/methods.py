"""Methods by the names that the command lines take."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import optax

from dstee_jax import methods

METHODS = {
    "dense": None,
    "static": methods.static,
    "set": methods.set,
    "rigl": methods.rigl,
    "dst_ee": methods.dst_ee,
    "set_itop": methods.set_itop,
    "rigl_itop": methods.rigl_itop,
}


def choice(valid: Sequence[str]):
    """An argparse type that takes one of `valid` and otherwise names the nearest."""

    def parse(text: str) -> str:
        if text in valid:
            return text
        near = difflib.get_close_matches(text, valid, n=3, cutoff=0.3) or list(valid)
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; nearest: {', '.join(near)}")

    return parse


def optimizer(
    method: str,
    inner: optax.GradientTransformation,
    *,
    sparsity: float,
    total_steps: int,
    key: jax.Array,
    **options: Any,
) -> optax.GradientTransformation:
    """`inner` made sparse by the method of that name; `inner` itself for 'dense'."""
    factory = METHODS[method]
    if factory is None:
        return inner
    return factory(inner, sparsity=sparsity, total_steps=total_steps, key=key, **options)
