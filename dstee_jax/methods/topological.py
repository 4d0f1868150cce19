"""Methods that grow by the topology of the masks, without a gradient."""

from collections.abc import Sequence
from typing import Unpack

import optax

from dstee_jax.arguments import check_number, is_number, shown
from dstee_jax.methods._common import Inner, Options, Transform, Untimed, linear, make
from dstee_jax.rules import scores
from dstee_jax.rules.phases import drop_then_grow
from dstee_jax.rules.sampling import sampled
from dstee_jax.rules.schedule import Every
from dstee_jax.rules.topology import ch2_l3n, ch3_l3p


def cht(inner: Inner = None, *, chain: Sequence[str] = (), **options: Unpack[Options]) -> Transform:
    """CHT: drop by magnitude, grow where most short paths lead (CH3-L3p), from the mask alone.

    A round takes two mask steps, on neither of which a weight is updated: `every` steps after
    the last drop 0.3 of each leaf goes, and on the next step as much grows, at zero, by the
    mask that is left; what was dropped may come back. Kernels of two axes only: leave
    convolutions dense with `where=`.

    Args:
      inner: the optimizer.
      chain: names of kernels that follow each other, as ('layer_0/kernel', 'layer_1/kernel'): after
        a drop, the links of hidden units without inputs or outputs go, too, and as many grow again
        in their leaves. Those units take no part in the training any more.
      **options: of `dstee.transform`; `every` is a number, 3 or more (the authors' is an epoch).
        `grow=scores.ch3_l3n()` costs less on large kernels; `masks=at_init.csti(...)` are the
        authors' first masks.

    Raises:
      ValueError: `every` is no such number, a sparse leaf has not two axes, or the chain names
        kernels that do not follow each other.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.cht(optax.sgd(0.1), sparsity=0.99, total_steps=300, every=100,
      ...                        key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [100, 101, 200, 201, 300]

    References:
      Zhang et al., "Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep learning", 2024, and its code.

    Deviations:
      The early stop of a layer that regrows what it dropped is left out: rounds go on to the end
      of the training.
    """
    defaults = {
        "plan": drop_then_grow(chain=chain),
        "grow": ch3_l3p(),
        "drop_fraction": optax.constant_schedule(0.3),
        "stop": 1.0,
    }
    every = _in_pairs(options.pop("every", 100), options.get("update_weights", False))
    return make(inner, defaults | {"every": every}, options)


def chts(
    inner: Inner = None,
    *,
    total_steps: int,
    last_power: float = 3.0,
    chain: Sequence[str] = (),
    **options: Unpack[Untimed],
) -> Transform:
    """CHTs: as `cht`, with sampling where CHT takes the best, and CH2-L3n.

    The kept weights are drawn with probability in proportion to |w|^T, T from 1 linearly to
    `last_power` over the training; the grown ones in proportion to the score. The drop fraction is
    0.3, by cosine to 0 at 0.75 of the training; `every` is 100.

    Args:
      inner: the optimizer.
      total_steps: number of calls of `update` in the whole training.
      last_power: T in the end; 9 in the authors' scripts for LLaMA, with `drop_fraction` 0.1.
      chain: as for `cht`.
      **options: of `dstee.transform`; pass `drop=scores.sampled(scores.relative_importance(), T)`
        for removal by relative importance.

    Raises:
      ValueError: as `cht`.

    References:
      Zhang et al., "Brain network science modelling of sparse neural networks enables
      Transformers and LLMs to perform as fully connected", 2025, and its code.

    Deviations:
      As `cht`. How T goes from 1 to its last value could not be checked.
    """
    check_number("last_power", last_power, "3.0")
    if not last_power >= 0:
        raise ValueError(f"last_power={last_power} must be 0 or more: 0 draws at random.")
    defaults = {
        "total_steps": total_steps,
        "plan": drop_then_grow(chain=chain),
        "drop": sampled(scores.magnitude(), linear(total_steps, 1.0, last_power)),
        "grow": sampled(ch2_l3n()),
    }
    every = _in_pairs(options.pop("every", 100), options.get("update_weights", False))
    return make(inner, defaults | {"every": every}, options)


def _in_pairs(every: Every | None, update_weights: bool) -> Every | None:
    """Mask steps at each multiple of `every` and on the step after it."""
    if every is None:
        return None
    least = 2 if update_weights else 3
    if callable(every) or not is_number(every) or every < least:
        raise ValueError(
            f"every={shown(every)} must be a number of {least} or more steps: a round takes two of "
            f"them{', and on neither a weight is updated' if least == 3 else ''}."
        )
    return lambda step: every if step == 0 else 1 if step % every == 0 else every - 1
