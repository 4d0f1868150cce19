"""Flax NNX layers whose kernels may be in tiles: `Linear`, `set_tiles`, `set_dense`.

Needs flax, which `import dstee_jax` does not: `from dstee_jax import tiled_nnx`.
"""

from typing import Any

import jax
from flax import nnx

from dstee_jax.state import get_states
from dstee_jax.tiling.forms import is_tiles, tiles, to_dense, to_tiles
from dstee_jax.tiling.products import along, matmul
from dstee_jax.tiling.tiles import Tiles
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name, unwrap


class TileIndex(nnx.Variable[Tiles | None]):
    """The `dstee.Tiles` of a layer's kernel, None while the kernel is dense; no parameter."""


class Linear(nnx.Linear):
    """`nnx.Linear` whose kernel is dense, or the rectangle of its active tiles.

    `set_tiles` and `set_dense` change the form. Split the model as `nnx.split(model, nnx.Param,
    TileIndex)`, and in a function that `jax.grad` takes merge it with `copy=True`. In `nnx.scan`
    and `nnx.vmap` the tiles are stacked along axis 0, as kernels are.

    Args:
      in_features, out_features: of the dense kernel (inputs, outputs), as it is made.
      rngs: `nnx.Rngs`.
      **options: of `nnx.Linear`, as use_bias, dtype, kernel_init; not those of its product.

    Raises:
      ValueError: an option is of the product; in the call, if input, kernel and tiles do not
        fit: names their shapes.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from dstee_jax.tiled_nnx import Linear, set_tiles
      >>> model = Linear(64, 32, rngs=nnx.Rngs(0))
      >>> tx = dstee.transform(optax.adam(1e-2), structure=dstee.structures.tiles((16, 16)),
      ...                      packed=True, sparsity=0.5, total_steps=1000, key=jax.random.key(0))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> _ = set_tiles(model, optimizer.opt_state)
      >>> grads = nnx.grad(lambda model, x: model(x).sum())(model, jnp.ones((8, 64)))
      >>> _ = optimizer.update(model, grads, mask_step=False)
      >>> model.kernel.shape
      (2, 32, 16)
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        if no := {"dot_general", "precision", "preferred_element_type"} & options.keys():
            raise ValueError(f"{sorted(no)} are of dense products, not of tiles: leave them out.")
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.tiles = TileIndex(None)

    def __call__(self, inputs: jax.Array, *, axis: int = -1) -> jax.Array:  # type: ignore[override]
        """Inputs of shape (..., inputs) to (..., outputs); with `axis=0`, as of `dstee.matmul`,
        of shape (inputs, ...) to (outputs, ...).
        """
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], bias), dtype=self.dtype
        )
        y = matmul(inputs, kernel, self.tiles.get_value(), axis=axis)
        return y if bias is None else y + along(bias, y, axis)


def set_tiles(model: nnx.Module, opt_state_or_tiles: PyTree, *, candidates: float = 0.0) -> PyTree:
    """Put the kernels of all `Linear` layers into rectangles, in place.

    At the start, and after each mask step. What is inactive is left out. Other layers, and those
    of `Linear` that are not sparse, stay as they are. With `candidates`, before a mask step that
    makes no dense gradient: `optimizer.update(model, grads, tiles=...)` of what it returns.

    Args:
      model: a module with `Linear` layers in it, their kernels in either form.
      opt_state_or_tiles: the state of an optimizer of `nnx.state(model, nnx.Param)`, as
        `nnx.Optimizer(...).opt_state`; or what `dstee.tiles` found in it.
      candidates: of `dstee.tiles`, which it is for where tiles are given.

    Returns:
      The tiles of the kernels, the structure of `nnx.state(model, nnx.Param)`; None for leaves
      that are no rectangles.

    Raises:
      ValueError: no layer's kernel is tiled, or the state is of another model.
    """
    layers = _layers(model)
    now = {name: layer.tiles.get_value() for name, layer in layers.items()}
    leaves, treedef = jax.tree.flatten(params := nnx.state(model, nnx.Param))
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    found = opt_state_or_tiles
    if get_states(found):
        shapes = [_dense_shape(x, now.get(name)) for name, x in zip(names, leaves, strict=True)]
        found = tiles(found, jax.tree.unflatten(treedef, shapes), candidates=candidates)
    nodes = jax.tree_util.tree_leaves_with_path(unwrap(found), is_leaf=is_tiles)
    active = {path_name(path): node for path, node in nodes if isinstance(node, Tiles)}
    if not active.keys() & layers.keys():
        raise ValueError(
            f"no Linear layer of {sorted(layers)} is among the tiled {sorted(active)}: "
            "make the layers with dstee_jax.tiled_nnx.Linear, and sparse with where=."
        )
    wanted = {name: active.get(name) for name in layers}
    _set(layers, wanted)
    return jax.tree.unflatten(treedef, [wanted.get(name) for name in names])


def _dense_shape(x: jax.Array, at: Tiles | None) -> Any:
    return x if at is None else jax.ShapeDtypeStruct(at.kernel_shape, x.dtype)


def set_dense(model: nnx.Module) -> None:
    """Make the kernels of all `Linear` layers dense, in place: before a dense step.

    Exact: `set_tiles` brings the same rectangles back. Those that are dense stay so.
    """
    layers = _layers(model)
    _set(layers, dict.fromkeys(layers))


def _layers(model: nnx.Module) -> dict[str, Linear]:
    """The layers by the names of their kernels."""
    found = nnx.iter_modules(model)
    return {"/".join((*map(str, path), "kernel")): x for path, x in found if isinstance(x, Linear)}


def _set(layers: dict[str, Linear], wanted: dict[str, Tiles | None]) -> None:
    now = {name: layer.tiles.get_value() for name, layer in layers.items()}
    changed = [name for name in layers if (now[name] or wanted[name]) is not None]
    kernels = {name: layers[name].kernel.get_value() for name in changed}
    for name, kernel in _converted(kernels, now, wanted).items():
        layers[name].kernel.set_value(kernel)
        layers[name].tiles.set_value(wanted[name])


@jax.jit
def _converted(kernels: PyTree, now: PyTree, wanted: PyTree) -> PyTree:
    """Kernels by name, from their tiles now to those wanted; None where dense."""

    def one(name: str) -> PyTree:
        kernel, at, to = ({name: tree[name]} for tree in (kernels, now, wanted))
        if to[name] is None:
            return to_dense(kernel, at)
        return to_tiles(kernel, to, of=None if at[name] is None else at)

    return {name: one(name)[name] for name in kernels}
