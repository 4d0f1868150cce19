"""`shrink`: a network without the hidden units that nobody needs.

A unit without active weights on its way out is read by nobody. One without active weights on its
way in is a constant, activation(bias), which the next layer's bias takes over.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.inference.chains import Layer, find_layers, put_layers
from dstee_jax.trees import PyTree


class Shrunk(NamedTuple):
    """What `shrink` returns.

    Attributes:
      params: the smaller parameters, same structure.
      kept: by layer: the output units that stay, as they were numbered; int64, sorted.
      units: by layer: how many there were, and how many stay.
      constants: by layer: units among `kept` that are a constant, which could not be moved into
        the next layer's bias (its convolution pads), or is the layer's last unit.
    """

    params: PyTree
    kept: dict[str, np.ndarray]
    units: dict[str, tuple[int, int]]
    constants: dict[str, np.ndarray]


def shrink(
    params: PyTree,
    chain: Sequence[str | int],
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    padding: str = "SAME",
) -> Shrunk:
    """Removes hidden units without weights in or out; what the network computes stays.

    At high sparsity many units have no active weight on one side (`dstee.summary` counts them).
    Those without any on the way out are removed. Those without any on the way in are the constant
    c = activation(bias): they are removed, and the next layer's bias becomes
    bias + c * (sum of the unit's weights there). Again, until nothing goes: a removed unit can be
    all that another one read, or was read by. Weights decide: exact zeros, as `dstee.transform`
    leaves them (`dstee.apply_masks` makes them).

    For a plain chain of layers, each of which reads the one before alone, with one elementwise
    activation between all of them, and nothing else but flattening (channels last) and pooling of
    each channel without padding. That is for you to know: branches, normalisation, dropout that
    stays on or other readers of a layer are not seen. Inputs of the first layer and outputs of
    the last stay.

    Args:
      params: pytree of arrays, Flax's layout; leaves outside the chain are returned as they are.
      chain: names of the layers in order, paths with slashes, as 'block_0/up'. Below each are
        `kernel`, (inputs, outputs) or (height, width, inputs, outputs), and perhaps `bias`
        (outputs,), and nothing else. Where a kernel has a multiple of the units before it as
        inputs, they were flattened from (batch, ..., channels).
      activation: elementwise, the same after all layers but the last.
      padding: 'VALID' if no convolution of the chain pads, 'SAME' if any does. At a padded border
        a constant is not there: units of a constant that is not 0 stay then, where the next
        layer's window is larger than 1 x 1.

    Returns:
      `Shrunk`. Every layer keeps at least one unit.

    Raises:
      ValueError: a name is not there or there twice, a layer has other leaves or shapes that do
        not chain, a constant needs a bias that the next layer does not have, the activation is
        not elementwise, or padding is another; names the layer and the remedy.

    Example:
      >>> import dstee_jax as dstee, jax.numpy as jnp
      >>> up = {"kernel": jnp.array([[1., 0., 2.]]), "bias": jnp.array([0., 3., 0.])}
      >>> down = {"kernel": jnp.array([[1.], [2.], [0.]]), "bias": jnp.array([5.])}
      >>> small = dstee.shrink({"up": up, "down": down}, ["up", "down"])
      >>> small.units["up"], small.params["down"]["bias"].tolist()
      ((3, 1), [11.0])
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(
            f"padding={padding!r} must be 'VALID' if no convolution of the chain pads, or 'SAME' "
            "if any does, whatever it pads with."
        )
    layers = find_layers(params, chain)
    numbers = [np.arange(layer.kernel.shape[-1]) for layer in layers]
    kept, constants = list(numbers), [np.arange(0) for _ in layers]
    changed = True
    while changed:
        changed = False
        for i in range(len(layers) - 1):
            here, after = layers[i : i + 2]
            going, fixed, moved = _going(here, after, activation, padding)
            constants[i] = kept[i][fixed & ~going]
            if going.any():
                layers[i], layers[i + 1] = _without(here, after, going, moved)
                kept[i], changed = kept[i][~going], True
    names = [layer.name for layer in layers]
    units = [(len(old), len(new)) for old, new in zip(numbers, kept, strict=True)]
    return Shrunk(
        put_layers(params, layers),
        dict(zip(names, kept, strict=True)),
        dict(zip(names, units, strict=True)),
        dict(zip(names, constants, strict=True)),
    )


def _going(
    here: Layer, after: Layer, activation: Callable[[jax.Array], jax.Array], padding: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which units of a layer go, which are constants, and what they add to the next bias.

    Bool and bool of shape (units,), float64 of shape (units, outputs of the next layer).
    """
    units = here.kernel.shape[-1]
    ways_out = after.by_unit(units)  # (places, units, outputs)
    read = (ways_out != 0).any((0, 2))
    fixed = ~(here.kernel != 0).any(tuple(range(here.kernel.ndim - 1)))
    value = _constants(here, activation)
    exact = (value == 0) | (padding == "VALID") | (after.kernel.shape[:-2] in ((), (1, 1)))
    going = ~read | (fixed & exact)
    if going.all():
        going[0] = False  # a layer of no units is none
    moved = value[:, None] * ways_out.astype(np.float64).sum(0)
    moved[~(going & read)] = 0
    if after.bias is None and moved.any():
        some = np.flatnonzero(moved.any(1))
        raise ValueError(
            f"{len(some)} units of {here.name} are a constant that is not 0, as unit {some[0]} "
            f"({value[some[0]]:.4g}), and {after.name} has no bias to take them over: give it one "
            f"of zeros, of shape ({after.kernel.shape[-1]},)."
        )
    return going, fixed, moved


def _constants(layer: Layer, activation: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    """What each unit is if its weights are zero: float64, shape (units,)."""
    units = layer.kernel.shape[-1:]
    bias = np.zeros(units, layer.kernel.dtype) if layer.bias is None else layer.bias
    value = activation(jnp.asarray(bias))
    if jnp.shape(value) != units:
        raise ValueError(
            f"activation makes {jnp.shape(value)} of {units}, the bias of {layer.name}: it must be "
            "elementwise, as jax.nn.relu."
        )
    return np.asarray(value, np.float64)


def _without(
    here: Layer, after: Layer, going: np.ndarray, moved: np.ndarray
) -> tuple[Layer, Layer]:
    """Both layers without the units that go, and the next bias with what they were."""
    stay = ~going
    bias = here.bias if here.bias is None else here.bias[stay]
    inputs = np.tile(stay, after.kernel.shape[-2] // len(stay))  # channels last, once for a place
    next_bias = after.bias
    if next_bias is not None:
        next_bias = (next_bias.astype(np.float64) + moved.sum(0)).astype(next_bias.dtype)
    smaller = here._replace(kernel=here.kernel[..., stay], bias=bias)
    return smaller, after._replace(kernel=after.kernel[..., inputs, :], bias=next_bias)
