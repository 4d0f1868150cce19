"""Output units of a kernel, wherever they lie.

Flax, Haiku and Keras keep kernels as (..., inputs, outputs), so the output axis is -1 by default;
Equinox and PyTorch keep them as (outputs, inputs, ...): there it is 0.
"""

import math

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


def output_units(shape: Shape, output_axis: int) -> int:
    """How many output units a kernel of that shape has; 1 for a scalar.

    Raises:
      ValueError: there is no such axis.
    """
    if not shape:
        return 1
    if not -len(shape) <= output_axis < len(shape):
        raise ValueError(
            f"output_axis={output_axis} is no axis of shape {shape}: pass -1 for kernels "
            "(..., inputs, outputs), as Flax has them, 0 for (outputs, inputs, ...), as Equinox."
        )
    return shape[output_axis]


def input_axes(shape: Shape, output_axis: int) -> Shape:
    """All axes but that of the output units."""
    output_units(shape, output_axis)
    return tuple(axis for axis in range(len(shape)) if axis != output_axis % len(shape))


def from_columns(x: jax.Array, shape: Shape, output_axis: int) -> jax.Array:
    """The array of that shape from what leads into each output unit, (units, fan-in)."""
    rest = [shape[axis] for axis in input_axes(shape, output_axis)]
    return jnp.moveaxis(x.reshape(x.shape[0], *rest), 0, output_axis)


def fan_in(shape: Shape, output_axis: int) -> int:
    """How many inputs each output unit has."""
    return math.prod(shape[axis] for axis in input_axes(shape, output_axis))
