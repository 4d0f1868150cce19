"""`apply`: one optimizer step that touches the active weights only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.packed import SparseUpdate, put, take
from dstee_jax.state import PyTree


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
    parameters are read and written. Donate `opt_state` and `params` to `jit`, or it copies
    them. With any other `tx` it does the two calls.

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
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(grads, opt_state, params, sparse_updates=True, **extra)

    def one(weight: jax.Array, update: Any) -> jax.Array:
        if not isinstance(update, SparseUpdate):
            return optax.apply_updates(weight, update)
        new = take(weight, update.indices) + update.values
        return put(weight, update.indices, jnp.asarray(new).astype(weight.dtype))

    leaves, treedef = jax.tree.flatten(params)
    flat = jax.tree.leaves(updates, is_leaf=lambda x: isinstance(x, SparseUpdate))
    return jax.tree.unflatten(treedef, list(map(one, leaves, flat))), opt_state
