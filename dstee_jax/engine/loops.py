"""A loop of no or one round, in place of a conditional."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def at_most_once(due: Any, function: Callable[..., Any], carry: Any) -> Any:
    """`function(due, carry)` if `due`, else `carry`; a Python bool leaves no trace.

    XLA updates in place what a loop carries, if the body reads it from its argument; what the
    branches of a `lax.cond` pass through it copies (on CPU, on every step).
    """
    if isinstance(due, bool):
        return function(due, carry) if due else carry

    def once(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        due, carry = loop
        return due & False, function(due, carry)

    return lax.while_loop(lambda loop: loop[0], once, (due, carry))[1]
