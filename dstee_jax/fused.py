"""`apply`: one optimizer step that touches the active weights only."""

from typing import Any

import jax
import optax

from dstee_jax.packed import SparseUpdate, put, take
from dstee_jax.state import PyTree, SparseState


def apply(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Update the parameters: `tx.update` and `optax.apply_updates` in one.

    With `transform(inner, packed=True)`, as `tx` or the last link of an `optax.chain`, the
    updates of inactive weights are never made: on ordinary steps only the active entries of the
    parameters are read and written. Donate `params` and `opt_state` to `jit`, in the order in
    which it returns them, or it copies them. With any other `tx` it does the two calls.

    Inactive parameters must be zero, as `apply_masks` and every step leave them; `tx.update`
    makes them zero whatever they were, `apply` does not look at them.

    Args:
      tx: the optimizer.
      grads: gradients, the structure of `params`.
      opt_state: its state.
      params: the parameters.
      **extra: extra arguments of `tx.update`.

    Returns:
      `(params, opt_state)`, both new.

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
    if not _ends_packed(opt_state):
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state
    # A chain hands extra arguments to each of its links.
    updates, opt_state = tx.update(grads, opt_state, params, sparse_updates=True, **extra)  # type: ignore[call-arg]

    def one(weight: jax.Array, update: Any) -> jax.Array:
        if not isinstance(update, SparseUpdate):
            return optax.apply_updates(weight, update)
        new = take(weight, update.indices) + update.values
        return put(weight, update.indices, new.astype(weight.dtype))

    leaves, treedef = jax.tree.flatten(params)
    flat = jax.tree.leaves(updates, is_leaf=lambda x: isinstance(x, SparseUpdate))
    return jax.tree.unflatten(treedef, list(map(one, leaves, flat))), opt_state


def _ends_packed(opt_state: PyTree) -> bool:
    """Whether this is the state of a packed `transform`, or of a chain that ends in one."""
    while type(opt_state) is tuple and opt_state:
        opt_state = opt_state[-1]
    return isinstance(opt_state, SparseState) and bool(jax.tree.leaves(opt_state.indices))
