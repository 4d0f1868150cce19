"""Distributions: how a network's sparsity is shared among its layers.

A distribution is a function `(shapes, sparsity) -> sparsities`, from the shapes of the selected
leaves by path to a sparsity for each. `active_counts` turns it into exact integer counts.
"""

import math
from collections.abc import Callable, Mapping

from dstee_jax.arguments import is_number, shown

Shape = tuple[int, ...]
Distribution = Callable[[Mapping[str, Shape], float], Mapping[str, float]]


def erk(shapes: Mapping[str, Shape], sparsity: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdős-Rényi-Kernel: density of a layer in proportion to sum(shape) / prod(shape).

    Layers whose density would pass 1 become dense, and the rest is shared among the others
    again, until none does. Small layers stay denser than large ones.

    Args:
      shapes: path -> shape of each selected leaf.
      sparsity: of all selected leaves together, in [0, 1).
      power: of the ratio; 1 is ERK, 0 is uniform.

    Returns:
      path -> sparsity in [0, 1).

    Example:
      >>> {k: round(v, 3) for k, v in erk({"a": (784, 300), "b": (300, 10)}, 0.9).items()}
      {'a': 0.911, 'b': 0.0}

    References:
      Evci et al., "Rigging the Lottery", 2020, Section 3; Mocanu et al., 2018.
    """
    empty = {name for name, shape in shapes.items() if 0 in shape}
    size = {name: math.prod(shape) for name, shape in shapes.items() if name not in empty}
    raw = {name: (sum(s) / size[name]) ** power for name, s in shapes.items() if name in size}
    dense: set[str] = set()
    while True:
        zeros = {name: math.floor(sparsity * size[name]) for name in size}
        sparse = [name for name in size if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, 0.0)
        budget = sum(size[n] - zeros[n] for n in sparse) - sum(zeros[n] for n in dense)
        scale = budget / sum(raw[n] * size[n] for n in sparse)
        highest = max(raw[n] for n in sparse)
        if highest * scale <= 1:
            break
        dense |= {n for n in sparse if raw[n] == highest}
    return {n: 0.0 if n in dense | empty else 1.0 - scale * raw[n] for n in shapes}


def uniform(
    shapes: Mapping[str, Shape], sparsity: float, *, first_dense: bool = False
) -> dict[str, float]:
    """The same sparsity for every layer.

    Args:
      shapes: path -> shape of each selected leaf, in the order of the parameters.
      sparsity: of each leaf, in [0, 1).
      first_dense: keep the first leaf (in the order of the parameters) dense, as RigL keeps
        the first convolution; the others keep `sparsity`. Use it through `functools.partial`.
        Dict keys are sorted by JAX: where the first layer does not come first by name, give
        `transform` a dict of sparsities by path instead.

    Returns:
      path -> sparsity in [0, 1).

    References:
      Evci et al., "Rigging the Lottery", 2020, Section 3.
    """
    result = dict.fromkeys(shapes, sparsity)
    if first_dense and result:
        result[next(iter(result))] = 0.0
    return result


def active_counts(
    shapes: Mapping[str, Shape],
    sparsity: float | Mapping[str, float],
    distribution: Distribution = erk,
) -> dict[str, int]:
    """Exact number of active weights for each leaf.

    Args:
      shapes: path -> shape of each selected leaf.
      sparsity: target in [0, 1) for all leaves together, or path -> sparsity of each leaf.
      distribution: how a single target is shared: `erk`, `uniform`, or a function like them.

    Returns:
      path -> count. Rounded to the nearest; the total is within one weight per leaf of what
      the distribution asks for.

    Raises:
      ValueError: a sparsity is outside [0, 1), leaves no weight in a leaf, or names no leaf.
    """
    if isinstance(sparsity, Mapping):
        unknown, missing = set(sparsity) - set(shapes), set(shapes) - set(sparsity)
        if unknown or missing:
            raise ValueError(
                f"sparsity names {sorted(unknown)}, which are not selected leaves, and leaves "
                f"out {sorted(missing)}: give one value for each of {sorted(shapes)}."
            )
        each: Mapping[str, float] = sparsity
    else:
        _check(sparsity, "sparsity")
        each = distribution(shapes, sparsity)
        if set(each) != set(shapes):
            raise ValueError(
                f"the distribution returned {sorted(each)}: return a sparsity for each of "
                f"{sorted(shapes)}."
            )
    counts = {}
    for name, shape in shapes.items():
        _check(each[name], f"sparsity of {name}")
        size = math.prod(shape)
        counts[name] = round((1.0 - each[name]) * size)
        if size and counts[name] < 1:
            raise ValueError(
                f"sparsity {each[name]:.6g} leaves no weight in {name} of shape {shape}: lower "
                "it, or leave the leaf dense with where=."
            )
    return counts


def check_sparsity(sparsity: float | Mapping[str, float] | None) -> None:
    """Raise a ValueError that names the value unless each is in [0, 1) (or there is none)."""
    if isinstance(sparsity, Mapping):
        for name, value in sparsity.items():
            _check(value, f"sparsity of {name}")
    elif sparsity is not None:
        _check(sparsity, "sparsity")


def _check(value: float, what: str) -> None:
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"{what} is {shown(value)}: it must be in [0, 1), as 0.95 for 5% of weights."
        )
