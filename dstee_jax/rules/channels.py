"""Channels: whole output units are active or not."""

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.arguments import check_whole
from dstee_jax.rules import units
from dstee_jax.rules.structures import Shape, Structure
from dstee_jax.selection.bisection import largest_bits
from dstee_jax.selection.parts import Grid


def channels(*, output_axis: int = -1) -> Structure:
    """All weights into an output unit, or channel, are active together, or none is.

    A round exchanges whole units, by the sums of their weights' scores, at least one, and never all
    that are active. What follows a layer still sees an inactive unit's bias; `dstee.shrink` takes
    out units that nothing leads to.

    Args:
      output_axis: of the units: -1 for kernels (..., inputs, outputs), as Flax has them, 0 for
        (outputs, inputs, ...), as Equinox and PyTorch have them.

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, for filters of least weight.
    """
    check_whole("output_axis", output_axis, least=None)

    def step(shape: Shape) -> int:
        return units.fan_in(shape, output_axis)

    def count(shape: Shape, wanted: int) -> int:
        n = units.output_units(shape, output_axis)
        return step(shape) * min(max(round(wanted / step(shape)), 1), n)

    def expand(active: jax.Array, shape: Shape) -> jax.Array:
        inputs = units.input_axes(shape, output_axis)
        return jnp.broadcast_to(jnp.expand_dims(active, inputs), shape)

    def random_mask(key: jax.Array, shape: Shape, wanted: int) -> jax.Array:
        bits = jax.random.bits(key, (units.output_units(shape, output_axis),), jnp.uint32)
        return expand(largest_bits([bits], jnp.uint32(wanted // step(shape)))[0], shape)

    def reduce(mask, drop_score, grow_score):
        inputs = units.input_axes(mask.shape, output_axis)
        return mask.any(inputs), drop_score.sum(inputs), grow_score.sum(inputs)

    def parts(shape, k, k_max, active, turn) -> tuple[Grid, jax.Array, int]:
        each = step(shape)
        most = max(active // each - 1, 0)
        of_units = jnp.clip(jnp.maximum(k // each, (k > 0).astype(k.dtype)), 0, most).astype(
            jnp.int32
        )
        return (1,), of_units, -(-k_max // each)

    def fits(mask: np.ndarray) -> bool:
        inputs = units.input_axes(mask.shape, output_axis)
        return bool((mask.any(inputs) == mask.all(inputs)).all())

    return Structure(count, random_mask, fits, reduce, parts, expand, step=step)
