"""Load what `save` wrote: parameters and masks, into a structure or as plain dictionaries."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dstee_jax.files import reader
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name, path_parts


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
      params: the parameters, bit for bit.
      masks: their structure, with a bool array for each leaf that was saved with a mask (True
        where active) and `optax.MaskedNode()` for every other; as `masks=` of `transform` and
        `apply_masks` take it.
      metadata: what was given to `save`.
    """

    params: PyTree
    masks: PyTree
    metadata: Any


def load(path: str | os.PathLike, like: PyTree | None = None) -> Saved:
    """Load parameters, masks and metadata that `save` wrote.

    Args:
      path: of the file.
      like: a pytree of arrays or of `jax.ShapeDtypeStruct`, as the model's parameters or
        `nnx.state(model, nnx.Param)`: what is loaded gets its structure, each leaf by its path,
        and lies on devices as its leaves do. Without it: nested dictionaries, and lists where
        there were some, of NumPy arrays.

    Returns:
      A `Saved`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, changed, of something else, of a later version or too
        large for this machine's memory (nothing is loaded then); or `like` has other leaves than
        the file, or one of another shape or type: names it.

    Example: see `save`.
    """
    found = reader.read(path)
    nodes = [optax.MaskedNode() if mask is None else mask for mask in found.masks]
    if like is None:
        keys = [leaf.path for leaf in found.leaves]
        return Saved(_nested(keys, found.arrays), _nested(keys, nodes), found.metadata)
    wanted = [(at, leaf) for at, leaf in leaves_with_path(like) if not is_dense(leaf)]
    order = _order(path, found.leaves, [at for at, _ in wanted])
    arrays = [
        _placed(path, at, found.arrays[i], leaf)
        for i, (at, leaf) in zip(order, wanted, strict=True)
    ]
    treedef = jax.tree.structure(like)
    masks = jax.tree.unflatten(treedef, [nodes[i] for i in order])
    return Saved(jax.tree.unflatten(treedef, arrays), masks, found.metadata)


def _order(path: Any, leaves: Sequence[reader.Leaf], wanted: Sequence[Any]) -> list[int]:
    """Which leaf of the file belongs to each path of `like`."""
    there = {leaf.name: i for i, leaf in enumerate(leaves)}
    names = ["/".join(path_parts(at)) for at in wanted]
    missing = [name for name in names if name not in there]
    unused = [name for name in there if name not in set(names)]
    if missing or unused:
        raise ValueError(
            f"like= does not have the leaves of {path}: the file lacks {missing[:5]}, and has "
            f"{unused[:5]} beside. Pass the parameters of the model that was saved."
        )
    return [there[name] for name in names]


def _placed(path: Any, at: Any, x: np.ndarray, like: Any) -> Any:
    """An array as `like` is: on its devices, in NumPy, or a Python number."""
    if isinstance(like, bool | int | float | complex):
        return x.item()
    shape, dtype = np.shape(like), getattr(like, "dtype", None)
    if (x.shape, x.dtype) != (shape, dtype):
        raise ValueError(
            f"{path_name(at)} has shape {x.shape} and type {x.dtype} in {path}, and {shape} and "
            f"{dtype} in like=: pass the parameters of the model that was saved."
        )
    if isinstance(like, np.ndarray | np.generic):
        return x
    return jax.device_put(x, getattr(like, "sharding", None))


def _nested(paths: Sequence[tuple[Any, ...]], values: Sequence[Any]) -> Any:
    """Values by their paths: dictionaries, and lists where the keys are positions."""
    if len(paths) == 1 and not paths[0]:
        return values[0]
    groups: dict[Any, tuple[list, list]] = {}
    for (first, *rest), value in zip(paths, values, strict=True):
        key = first[0] if isinstance(first, list) else first
        below = groups.setdefault(key, ([], []))
        below[0].append(tuple(rest))
        below[1].append(value)
    found = {key: _nested(*below) for key, below in groups.items()}
    positions = paths and all(type(path[0]) is int for path in paths)
    return [found[i] for i in sorted(found)] if positions else found
