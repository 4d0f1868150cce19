"""Trees of arrays: the names of their leaves, and masks beside parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


def is_dense(node: Any) -> bool:
    """Whether a node of `masks` stands for a leaf that stays dense."""
    return isinstance(node, optax.MaskedNode)


def masked(mask: Any, x: jax.Array) -> jax.Array:
    """Zero where the mask is False; x itself for a dense leaf."""
    return x if is_dense(mask) else jnp.where(expanded(mask, x.shape), x, jnp.zeros_like(x))


def expanded(x: Any, shape: tuple[int, ...]) -> Any:
    """A mask or counter of tiles as one of the weights of a leaf of that shape.

    Each axis of x divides the leaf's: an entry stands for a box of weights. Others as they are.
    """
    if is_dense(x) or x.shape == shape:
        return x
    boxes = [(parts, n // parts) for parts, n in zip(x.shape, shape, strict=True)]
    cut = x.reshape([n for parts, _ in boxes for n in (parts, 1)])
    concrete = isinstance(x, np.ndarray)  # stays so within jit
    return (
        (np if concrete else jnp)
        .broadcast_to(cut, [n for box in boxes for n in box])
        .reshape(shape)
    )


def path_name(path: Any) -> str:
    """The name of a leaf: its path with slashes, as 'Dense_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_path(tree: PyTree) -> list[tuple[Any, Any]]:
    """Paths and leaves, as JAX gives them, without the '/value' of Flax NNX's Variables.

    NNX wraps the same leaf in a Param, an OptVariable or not at all.
    """

    def is_leaf(node: Any) -> bool:
        return is_variable(node) or is_dense(node)

    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path, x.get_value() if is_variable(x) else x) for path, x in pairs]


def path_parts(path: Any) -> tuple[str, ...]:
    """A key path as strings, for comparing paths through trees of different types."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def mask_leaves(masks: PyTree, params: PyTree) -> list[Any]:
    """Flatten `masks` in the order of the leaves of `params` (`MaskedNode` where dense).

    Compares paths, not tree types. A MaskedNode in `params` is what `optax.masked` leaves there:
    not a leaf. One in `masks` stands for all that `params` has below it.

    Raises:
      ValueError: masks and parameters do not have the same paths; names one.
    """
    given = {path_parts(path): mask for path, mask in leaves_with_path(masks)}
    flat, unused = [], {path for path, mask in given.items() if not is_dense(mask)}
    for path, node in leaves_with_path(params):
        if is_dense(node):
            continue
        full = path_parts(path)
        above = [full[:n] for n in range(len(full), -1, -1)]
        found = next((p for p in above if p in given and (p == full or is_dense(given[p]))), None)
        if found is None:
            raise ValueError(f"masks have nothing for {path_name(path)} of params. {_HOW}")
        flat.append(given[found])
        unused.discard(found)
    if unused:
        names = sorted("/".join(path) for path in unused)
        raise ValueError(f"masks have {names}, which params do not have. {_HOW}")
    return flat


_HOW = (
    "Masks and params must have the same structure, with a bool array for each sparse leaf and "
    "optax.MaskedNode() for each dense one."
)


def replace_leaves(masks: PyTree, params: PyTree, new: list[Any]) -> PyTree:
    """Put `new`, in the order of the leaves of `params`, into the structure of `masks`."""
    flat, treedef = jax.tree.flatten(masks, is_leaf=is_dense)
    nodes = jax.tree.leaves(params, is_leaf=is_dense)
    values = iter(new)
    pairs = zip(flat, nodes, strict=True)
    return jax.tree.unflatten(treedef, [m if is_dense(n) else next(values) for m, n in pairs])


def is_variable(node: Any) -> bool:
    """Whether node is a Flax NNX Variable (told by its interface: Flax is not imported)."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def unwrap(tree: PyTree) -> PyTree:
    """Replace the Variables in which `nnx.Optimizer` keeps state by their values."""

    def value(node: Any) -> Any:
        return unwrap(node.get_value()) if is_variable(node) else node

    return jax.tree.map(value, tree, is_leaf=is_variable)
