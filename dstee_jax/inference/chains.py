"""A plain chain of layers within parameters: found by name, checked, and put back."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name


class Layer(NamedTuple):
    """A layer of a chain, in NumPy."""

    name: str
    kernel: np.ndarray  # (inputs, outputs) or (height, width, inputs, outputs)
    bias: np.ndarray | None  # (outputs,)

    def by_unit(self, units: int) -> np.ndarray:
        """The kernel as (places, units, outputs), of that many units in the layer before.

        Places are those of the window, or, after flattening, of the image.
        """
        return self.kernel.reshape(-1, units, self.kernel.shape[-1])


def find_layers(params: PyTree, chain: Sequence[str | int]) -> list[Layer]:
    """The layers of those names, in order.

    Raises:
      ValueError: as `dstee.shrink` says; names the layer and the remedy.
    """
    names = [str(name).strip("/") for name in ([chain] if isinstance(chain, str) else chain)]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"chain={names} must name two layers or more, each once: a layer that is used twice "
            "cannot lose units for one of its uses."
        )
    leaves = {path_name(path): leaf for path, leaf in leaves_with_path(params)}
    layers = [_layer(name, leaves) for name in names]
    for before, after in itertools.pairwise(layers):
        units, inputs = before.kernel.shape[-1], after.kernel.shape[-2]
        flattened = before.kernel.ndim == 4 and after.kernel.ndim == 2 and inputs % units == 0
        if inputs != units and not flattened:
            raise ValueError(
                f"{before.name} has {units} outputs and {after.name} {inputs} inputs: the chain "
                "must name every layer in the order in which they are called, and a layer after "
                "flattening has a multiple of the channels."
            )
    return layers


def put_layers(params: PyTree, layers: Sequence[Layer]) -> PyTree:
    """Params with the kernels and biases of these layers; NumPy's stay NumPy's."""
    new = {f"{layer.name}/kernel": layer.kernel for layer in layers}
    new |= {f"{layer.name}/bias": layer.bias for layer in layers if layer.bias is not None}
    leaves, treedef = jax.tree.flatten(params)
    names = [path_name(path) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]

    def one(name: str, leaf: Any) -> Any:
        if name not in new:
            return leaf
        return new[name] if isinstance(leaf, np.ndarray) else jnp.asarray(new[name])

    pairs = zip(names, leaves, strict=True)
    return jax.tree.unflatten(treedef, [one(name, leaf) for name, leaf in pairs])


def _layer(name: str, leaves: dict[str, Any]) -> Layer:
    below = {
        path.removeprefix(f"{name}/"): leaf
        for path, leaf in leaves.items()
        if path.startswith(f"{name}/")
    }
    if "kernel" not in below:
        layers = sorted(path.rpartition("/")[0] for path in leaves if path.endswith("/kernel"))
        raise ValueError(f"params have no {name}/kernel: the layers that have one are {layers}.")
    others = sorted(below.keys() - {"kernel", "bias"})
    if others:
        raise ValueError(
            f"{name} has {others} beside kernel and bias: only plain layers shrink. Fold a "
            "normalisation into kernel and bias first, or leave the layer out."
        )
    kernel = np.asarray(below["kernel"])
    bias = np.asarray(below["bias"]) if below.get("bias") is not None else None
    if kernel.ndim not in (2, 4) or (bias is not None and bias.shape != kernel.shape[-1:]):
        raise ValueError(
            f"{name} has a kernel of shape {kernel.shape} and a bias of shape "
            f"{None if bias is None else bias.shape}: pass (inputs, outputs) or (height, width, "
            "inputs, outputs) and (outputs,); take stacked layers apart, and tiles by "
            "dstee.to_dense(params, tiles)."
        )
    return Layer(name, kernel, bias)
