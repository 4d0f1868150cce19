"""Parameters whose tiled kernels are rectangles: which they are, and on which steps they may be."""

from typing import Any

import jax
import jax.numpy as jnp

from dstee_jax.engine.config import Config
from dstee_jax.state import SparseState
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, mask_leaves, path_name


def rectangles(config: Config, state: SparseState, params: PyTree, mask_step: bool) -> list[bool]:
    """Which leaves of the parameters are rectangles (`dstee.to_tiles`).

    Raises:
      ValueError: a kernel has neither of its two shapes, or is a rectangle where the step needs
        it dense.
    """
    leaves = [(path, x) for path, x in leaves_with_path(params) if not is_dense(x)]
    if not config.tiled:
        return [False] * len(leaves)
    masks, indices = mask_leaves(state.masks, params), mask_leaves(state.indices, params)
    rows = zip(leaves, masks, indices, strict=True)
    found = [
        not is_dense(mask) and _is_rectangle(config, path_name(path), jnp.shape(x), mask, index)
        for (path, x), mask, index in rows
    ]
    if any(found):
        path, leaf = leaves[found.index(True)]
        _check_step(config, f"{path_name(path)} of shape {jnp.shape(leaf)}", mask_step)
    return found


def _is_rectangle(
    config: Config, name: str, shape: tuple[int, ...], mask: jax.Array, index: jax.Array
) -> bool:
    assert config.rule.structure is not None
    inputs, outputs = config.rule.structure.tile
    rows, columns = mask.shape[-2:]
    stack = index.shape[:-2]
    dense = (*stack, ..., rows * inputs, columns * outputs)
    if len(shape) == mask.ndim and (*shape[: len(stack)], ..., *shape[-2:]) == dense:
        return False
    depth = index.shape[-1] * inputs
    rectangle = (*stack, columns, shape[-2] if len(shape) > 1 else 0, outputs)
    if shape == rectangle and shape[-2] % depth == 0:
        return True
    raise ValueError(
        f"{name} has shape {shape}, where its tiles of {inputs, outputs} need {_text(dense)}, or "
        f"as a rectangle {_text((*stack, columns, depth, outputs))}, times a convolution's places: "
        "it is another kernel's."
    )


def _text(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join("..." if n is ... else str(n) for n in shape) + ")"


def check_rectangle(config: Config, what: str) -> None:
    """Raise a ValueError if an option does not go with parameters that are rectangles."""
    if not config.packed:
        raise ValueError(
            f"{what} is a rectangle of tiles, and the optimizer's moments are dense: pass "
            "packed=True to dstee.transform."
        )
    for name in ("memory", "penalty"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{what} is a rectangle of tiles, and {name}= reads all weights on each step: "
                "train with dense parameters, or without it."
            )


def _check_step(config: Config, what: str, mask_step: bool) -> None:
    check_rectangle(config, what)
    if mask_step and config.rounds.every:
        raise ValueError(
            f"{what} is a rectangle of tiles, and a mask step needs parameters and gradients "
            "dense, of dstee.to_dense(params, tiles), or in tiles with candidates, which tiles= "
            "says: make them so on dstee.dense_steps_of(tx), and pass mask_step=False on the other "
            "steps."
        )
