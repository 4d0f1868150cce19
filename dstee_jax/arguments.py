"""What arguments must be: errors that name the value and what to pass in its place."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def shown(value: Any) -> str:
    """A value as errors name it: its repr, but for what would fill the screen."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... (a {type(value).__name__})"


def is_number(value: Any) -> bool:
    """Whether a value is one finite real number; what is traced is taken for one."""
    if isinstance(value, jax.core.Tracer):
        return True
    if isinstance(value, bool | str | bytes) or getattr(value, "shape", ()) != ():
        return False
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def check_number(name: str, value: Any, example: str) -> None:
    """Raise a ValueError that names the value unless it is one finite number."""
    if not is_number(value):
        raise ValueError(f"{name}={shown(value)} must be a finite number, as {example}.")


def check_whole(name: str, value: Any, least: int | None = 1) -> None:
    """Raise a ValueError that names the value unless it is a whole number, not below `least`."""
    low = least is not None and is_number(value) and value < least
    if not is_number(value) or low or value != int(value):
        bound = "" if least is None else f" of {least} or more"
        raise ValueError(f"{name}={shown(value)} must be a whole number{bound}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError that names the value unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={shown(value)} must be True or False.")


def check_function(name: str, value: Any, of: str, example: str, *, inputs: int = 1) -> None:
    """Raise a ValueError unless value can be called with so many arguments.

    Args:
      name, value: of the argument.
      of: what it is a function of, as 'one leaf'.
      example: of what to pass.
      inputs: how many arguments.
    """
    wrong = not callable(value) or _makes_functions(value)
    if not wrong:
        try:
            inspect.signature(value).bind(*range(inputs))
        except TypeError:
            wrong = True
        except ValueError:
            pass  # some builtins have no signature
    if wrong:
        raise ValueError(f"{name}={shown(value)} must be a function of {of}, as {example}.")


def check_made(name: str, value: Any, kind: type, example: str) -> None:
    """Raise a ValueError unless value is None or of a kind, as a call of the library's gives it."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={shown(value)} is no {kind.__name__}: pass {example}.")


def _makes_functions(value: Any) -> bool:
    """Whether value is a factory of the library's rules, as `scores.gradient`, and not a call."""
    name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", None) or ""
    return module.startswith("dstee_jax.rules.") and "<" not in name


def as_numbers(sparsity: Any) -> Any:
    """A checked sparsity, or those of a dict, as Python's numbers: none is an array within jit."""
    if isinstance(sparsity, Mapping):
        return {name: float(value) for name, value in sparsity.items()}
    return float(sparsity)
