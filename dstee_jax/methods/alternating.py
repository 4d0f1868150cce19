"""AC/DC: dense and sparse phases in turn."""

import math
from collections.abc import Callable
from typing import Unpack

from dstee_jax.arguments import check_number, check_whole
from dstee_jax.masks.counts import Sparsity
from dstee_jax.methods._common import Inner, Shared, Transform, make
from dstee_jax.rules import scores
from dstee_jax.rules.phases import alternate


class AcDcOptions(Shared, total=False):
    """Keyword arguments of `dstee.transform` that `ac_dc` does not name."""

    sparsity: Sparsity | None


def ac_dc(
    inner: Inner = None,
    *,
    total_steps: int,
    start: float = 0.1,
    stop: float = 0.85,
    sparse_phase: float = 0.05,
    dense_phase: float = 0.05,
    **options: Unpack[AcDcOptions],
) -> Transform:
    """AC/DC: training dense and sparse in turn, and sparse in the end.

    Each sparse phase keeps the weights of largest magnitude of the whole network, chosen once at
    its beginning; the dense phase after it activates the others again, at zero. The defaults are
    ResNet-50's 100 epochs: dense to 10, then 5 sparse and 5 dense in turn, sparse 70 to 75, dense
    75 to 85, sparse from 85. CIFAR's 200 epochs are `start=0.05, stop=0.85, sparse_phase=0.1,
    dense_phase=0.1`.

    Args:
      inner: the optimizer; its learning rate goes on as it would.
      total_steps: number of calls of `update` in the whole training.
      start: share of the training at which the first sparse phase begins.
      stop: share at which the last one begins; the dense phase before it lasts until then.
      sparse_phase: length of the others, a share of the training.
      dense_phase: length of the dense phases between them.
      **options: of `dstee.transform`; `plan=plans.alternate(overall=False)` keeps each leaf's own
        count, `every` makes all phases equally long.

    Raises:
      ValueError: a share is out of range.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.ac_dc(optax.sgd(0.1), sparsity=0.9, total_steps=100,
      ...                          key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]

    References:
      Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
      2021, Algorithm 1, and its code.

    Deviations:
      A weight that comes back starts with the moments that `inner.init` gives; those of the
      others go on (theirs can zero all of them).
    """
    check_whole("total_steps", total_steps, least=None)
    shares = {
        "start": start,
        "stop": stop,
        "sparse_phase": sparse_phase,
        "dense_phase": dense_phase,
    }
    for name, share in shares.items():
        check_number(name, share, "0.5")
    if not (0 < start <= stop <= 1 and 0 < sparse_phase <= 1 and 0 < dense_phase <= 1):
        raise ValueError(
            f"start={start}, stop={stop}, sparse_phase={sparse_phase} and "
            f"dense_phase={dense_phase} are shares of total_steps above 0, at most 1, and start "
            "comes first."
        )
    defaults = {
        "total_steps": total_steps,
        "plan": alternate(),
        "grow": scores.random(),
        "drop_fraction": 0.0,
        "every": _next(_begins(total_steps, start, stop, sparse_phase, dense_phase)),
        "start": start,
        "stop": stop,
        "update_weights": True,
    }
    return make(inner, defaults, options)


def _begins(total: int, start: float, stop: float, sparse: float, dense: float) -> list[int]:
    """The steps on which phases begin: sparse, dense, ..., sparse."""
    first = max(math.ceil(round(start * total, 6)), 1)
    last = max(math.floor(round(stop * total, 6)), 1)
    sparse_steps, dense_steps = (max(round(share * total), 1) for share in (sparse, dense))
    cycles = range(first, last - sparse_steps, sparse_steps + dense_steps)
    return [step for at in cycles for step in (at, at + sparse_steps)] + [last]


def _next(steps: list[int]) -> Callable[[int], int]:
    """`every` of these mask steps."""

    def every(step: int) -> int:
        return next((at - step for at in steps if at > step), steps[-1])

    return every
