"""The state of sparse training: a NamedTuple of arrays, and how to find it in a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import shown
from dstee_jax.trees import PyTree, unwrap


class SparseState(NamedTuple):
    """State of `dstee.transform`. Arrays only; it can be donated, saved, sharded and vmapped.

    `masks` and `counters` have the structure of the parameters, with an `optax.MaskedNode()`
    for each leaf that stays dense. With `structures.tiles` they are kept for tiles.
    """

    count: jax.Array  # type: ignore[assignment]  # int32, shape (): how many times update was called
    key: jax.Array  # uint32: data of a PRNG key, which is folded with count and never split
    masks: PyTree  # bool, shape of the parameter: True where a weight is active
    counters: PyTree  # uint16, shape of the parameter: rounds a weight was active, saturating
    rule_state: PyTree  # (), or the RuleState of a method that keeps something of its own
    inner_state: PyTree  # state of the inner optimizer, () without one
    needs_dense: jax.Array  # bool, shape (): whether the next update reads inactive gradients
    # With packed= or indices=: uint32, where the active weights of a leaf are; with tiles: int32,
    # shape (..., columns of tiles, active tiles in each), the rows of the active tiles.
    indices: PyTree = ()
    tile_sizes: PyTree = ()  # with tiles: int32, shape (), weights of a tile of each leaf


class RuleState(NamedTuple):
    """What a method keeps of its own: its memory of each leaf, and its plan's state."""

    memory: PyTree  # the structure of masks, an array for each sparse leaf; () if none is kept
    plan: PyTree  # () if the plan keeps nothing
    gradients: PyTree = ()  # with grow_batches=: float32 sums of dense gradients, as memory
    grown: PyTree = ()  # with scale=: int32, as masks: the step at which a weight was grown, or 0


class Leaf(NamedTuple):
    """What a score function sees of one parameter array at a mask update."""

    param: jax.Array  # the weights, inactive ones zero
    grad: jax.Array  # the dense gradient, shape of param
    mask: jax.Array  # bool, shape of param: True where active before the update
    counter: jax.Array  # uint16, shape of param: rounds in which the weight was active
    key: jax.Array  # typed PRNG key of this leaf, round and score
    count: jax.Array  # type: ignore[assignment]  # int32, shape (): the step t, from 1
    rule_state: Any = ()  # the method's memory of this leaf
    target: int | None = None  # active weights of this leaf at the asked sparsity, if known
    grown: Any = ()  # with scale=: int32, shape of param: as in RuleState


class LeafWithoutGrad(Leaf):
    """A leaf whose gradient nobody passed: reading it is an error that says how to pass it."""

    @property
    def grad(self) -> jax.Array:  # type: ignore[override]
        raise ValueError(f"This score reads the gradient. {NO_GRAD}")


NO_GRAD = (
    "dstee.transform() without an inner optimizer sees only the updates that come down the chain. "
    "Pass the raw gradient: tx.update(grads, opt_state, params, grad=grads), or give the optimizer "
    "to transform: dstee.transform(optax.sgd(0.1), ...)."
)


def at_least_float32(dtype: Any) -> Any:
    """A float dtype, float32 instead of narrower ones; also under strict dtype promotion."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def get_states(opt_state: PyTree) -> list[SparseState]:
    """All `SparseState`s inside an optimizer state, in order; none for a dense optimizer's.

    Args:
      opt_state: as for `get_state`.
    """
    is_state = lambda node: isinstance(node, SparseState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return [unwrap(node) for node in nodes if is_state(node)]


def get_state(opt_state: PyTree) -> SparseState:
    """Find the one `SparseState` in the state of any chain of optax transformations.

    Args:
      opt_state: an optax state that holds exactly one `SparseState`, at any depth; also
        `nnx.Optimizer(...).opt_state`, whose Variables are unwrapped.

    Returns:
      The `SparseState`.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(dstee.transform(
      ...     optax.sgd(0.1), sparsity=0.5, total_steps=200, key=jax.random.key(0)))
      >>> state = dstee.get_state(tx.init({"kernel": jnp.ones((4, 4))}))
      >>> int(state.masks["kernel"].sum())
      8
    """
    states = get_states(opt_state)
    if len(states) != 1:
        raise ValueError(
            f"opt_state holds {len(states)} SparseStates, expected exactly 1: pass the state "
            "that the init of an optimizer with one dstee.transform() in it returned."
        )
    return states[0]


def seed_axes(opt_state: PyTree) -> PyTree:
    """`in_axes`/`out_axes` for `jax.vmap` over seeds: all batched but the step counters.

    With a batched step counter, what mask steps alone do would be done on every one of them for
    all seeds, and selected.

    Args:
      opt_state: an optax state (or its `jax.eval_shape`) with `SparseState`s in it.

    Returns:
      A pytree of 0 and None with the structure of `opt_state`.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> def init(key):
      ...     tx = dstee.transform(optax.sgd(0.1), sparsity=0.5, total_steps=200, key=key)
      ...     return tx.init({"kernel": jnp.ones((4, 4))})
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> axes = dstee.seed_axes(jax.eval_shape(init, keys[0]))
      >>> states = jax.vmap(init, out_axes=axes)(keys)
      >>> states.count.shape, states.masks["kernel"].shape
      ((), (3, 4, 4))
    """
    counters = {
        SparseState: ("count", "needs_dense"),
        optax.MultiStepsState: ("mini_step", "gradient_step"),
    }

    def axes(node: Any) -> Any:
        names = counters.get(type(node))
        if names is None:
            return 0
        fields = {
            name: None if name in names else jax.tree.map(axes, value, is_leaf=holds_counter)
            for name, value in node._asdict().items()
        }
        return type(node)(**fields)

    def holds_counter(node: Any) -> bool:
        return type(node) in counters

    return jax.tree.map(axes, opt_state, is_leaf=holds_counter)


def check_key(key: Any) -> None:
    """Raise a ValueError unless key is one PRNG key, typed or legacy."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and not (dtype == jnp.uint32 and shape is not None and len(shape) == 1):
        raise ValueError(f"key={shown(key)} is not one PRNG key: pass jax.random.key(0).")


def key_data(key: jax.Array) -> jax.Array:
    """A copy of a PRNG key's data, uint32: donating the state can't eat the caller's key."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jnp.array(jax.random.key_data(key) if typed else key, copy=True)


def wrap_key(data: jax.Array, like: jax.Array) -> jax.Array:
    """A typed key from its data, of the implementation of another; a typed one as it is."""
    if jnp.issubdtype(data.dtype, jax.dtypes.prng_key):
        return data  # of an older checkpoint
    typed = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like) if typed else None)
