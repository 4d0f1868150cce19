"""`apply`: one optimizer step that touches the active weights only."""

from typing import Any

import optax

from dstee_jax.state import SparseState
from dstee_jax.trees import PyTree


def apply(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    *,
    mask_step: bool = True,
    tiles: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Update the parameters: `tx.update` and `optax.apply_updates` in one.

    With `transform(inner, packed=True)`, as `tx` or the last link of an `optax.chain`, the
    updates of inactive weights are never made: on ordinary steps only the active entries of the
    parameters are read and written, in place. Donate `params` and `opt_state` to `jit`, in the
    order in which it returns them, or it copies them. With any other `tx` it does the two calls.

    A training loop that knows which steps are mask steps (`dstee.mask_steps`) can have two
    programs, that of ordinary steps without a conditional in it: with `mask_step` a static
    argument of its jitted step.

    With `structures.tiles` and `packed=True`, parameters and gradients of steps that are not in
    `dstee.dense_steps_of(tx)` may be rectangles of their active tiles (`dstee.to_tiles`), and on
    mask steps rectangles that have candidates beside them, which `tiles=` says: then weights grow
    among the candidates alone, and scores see the active tiles and candidates as if they were
    all. The new parameters are in the same rectangles.

    Inactive parameters must be zero, as `apply_masks` and every step leave them; `tx.update`
    makes them zero whatever they were, `apply` does not look at them.

    Args:
      tx: the optimizer.
      grads: gradients, the structure of `params`.
      opt_state: its state.
      params: the parameters.
      mask_step: False (a Python bool) promises that this is not a mask step; where the promise
        is broken, the round is left out. True leaves it to the schedule. `tx.update` takes it
        too.
      tiles: of `dstee.tiles(..., candidates=)`, if `params` and `grads` are their rectangles: of
        the state as it is before the step. `tx.update` takes it too.
      **extra: extra arguments of `tx.update`.

    Returns:
      `(params, opt_state)`, both new.

    Raises:
      ValueError: shapes do not fit, or an option reads what is not there; names them.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> tx = dstee.transform(optax.adamw(1e-2), sparsity=0.9, total_steps=1000,
      ...                      key=jax.random.key(0), packed=True)
      >>> params = {"kernel": jnp.ones((20, 10))}
      >>> opt_state = tx.init(params)
      >>> params = dstee.apply_masks(params, opt_state)
      >>> params, opt_state = dstee.apply(tx, params, opt_state, params)
      >>> int((params["kernel"] != 0).sum()), opt_state.inner_state[0].mu["kernel"].shape
      (20, (1, 20))
    """
    if mask_step is not True:
        extra["mask_step"] = mask_step
    if tiles is not None:
        extra["tiles"] = tiles
    if not _ends_sparse(opt_state):
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state
    # A chain hands extra arguments to each of its links; what the last one returns, it returns.
    return tx.update(grads, opt_state, params, as_params=True, **extra)  # type: ignore[call-arg]


def _ends_sparse(opt_state: PyTree) -> bool:
    """Whether this is the state of `transform`, or of a chain that ends in one."""
    while type(opt_state) is tuple and opt_state:
        opt_state = opt_state[-1]
    return isinstance(opt_state, SparseState)
