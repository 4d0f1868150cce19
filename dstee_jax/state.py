"""The state of sparse training: a NamedTuple of arrays, and how to find it in a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class SparseState(NamedTuple):
    """State of `dstee.transform`. Arrays only; it can be donated, saved, sharded and vmapped.

    `masks` and `counters` have the structure of the parameters, with an `optax.MaskedNode()`
    for each leaf that stays dense.
    """

    count: jax.Array  # type: ignore[assignment]  # int32, shape (): how many times update was called
    key: jax.Array  # typed PRNG key, shape (): folded with count, never split
    masks: PyTree  # bool, shape of the parameter: True where a weight is active
    counters: PyTree  # uint16, shape of the parameter: rounds a weight was active, saturating
    rule_state: PyTree  # (), or the RuleState of a method that keeps something of its own
    inner_state: PyTree  # state of the inner optimizer, () without one
    needs_dense: jax.Array  # bool, shape (): whether the next update reads inactive gradients
    indices: PyTree = ()  # with packed= or indices=: uint32, where the active weights of a leaf are


class RuleState(NamedTuple):
    """What a method keeps of its own: its memory of each leaf, and its plan's state."""

    memory: PyTree  # the structure of masks, an array for each sparse leaf; () if none is kept
    plan: PyTree  # () if the plan keeps nothing
    gradients: PyTree = ()  # with grow_batches=: float32 sums of dense gradients, as memory


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


def is_dense(node: Any) -> bool:
    """Whether a node of `masks` stands for a leaf that stays dense."""
    return isinstance(node, optax.MaskedNode)


def masked(mask: Any, x: jax.Array) -> jax.Array:
    """Zero where the mask is False; x itself for a dense leaf."""
    return x if is_dense(mask) else jnp.where(mask, x, jnp.zeros_like(x))


def at_least_float32(dtype: Any) -> Any:
    """A float dtype, float32 instead of narrower ones; also under strict dtype promotion."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def path_name(path: Any) -> str:
    """The name of a leaf: its path with slashes, as 'Dense_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_path(tree: PyTree) -> list[tuple[Any, Any]]:
    """Paths and leaves, as JAX gives them, without the '/value' of Flax NNX's Variables.

    NNX wraps the same leaf in a Param, an OptVariable or not at all.
    """

    def is_leaf(node: Any) -> bool:
        return _is_variable(node) or is_dense(node)

    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path, x.get_value() if _is_variable(x) else x) for path, x in pairs]


def path_parts(path: Any) -> tuple[str, ...]:
    """A key path as strings, for comparing paths through trees of different types."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def mask_leaves(masks: PyTree, params: PyTree) -> list[Any]:
    """Flatten `masks` in the order of the leaves of `params` (`MaskedNode` where dense).

    Compares paths, not tree types. A MaskedNode in `params` is what `optax.masked` leaves there:
    not a leaf. One in `masks` stands for all that `params` has below it.
    """
    given = {path_parts(path): mask for path, mask in leaves_with_path(masks)}
    flat, unused = [], {path for path, mask in given.items() if not is_dense(mask)}
    for path, node in leaves_with_path(params):
        if is_dense(node):
            continue
        full = path_parts(path)
        above = [full[:n] for n in range(len(full), -1, -1)]
        found = next((p for p in above if p in given and (p == full or is_dense(given[p]))), None)
        if found is None:
            raise ValueError(f"masks have nothing for {path_name(path)} of params. {_HOW}")
        flat.append(given[found])
        unused.discard(found)
    if unused:
        names = sorted("/".join(path) for path in unused)
        raise ValueError(f"masks have {names}, which params do not have. {_HOW}")
    return flat


_HOW = (
    "Masks and params must have the same structure, with a bool array for each sparse leaf and "
    "optax.MaskedNode() for each dense one."
)


def replace_leaves(masks: PyTree, params: PyTree, new: list[Any]) -> PyTree:
    """Put `new`, in the order of the leaves of `params`, into the structure of `masks`."""
    flat, treedef = jax.tree.flatten(masks, is_leaf=is_dense)
    nodes = jax.tree.leaves(params, is_leaf=is_dense)
    values = iter(new)
    pairs = zip(flat, nodes, strict=True)
    return jax.tree.unflatten(treedef, [m if is_dense(n) else next(values) for m, n in pairs])


def _is_variable(node: Any) -> bool:
    """Whether node is a Flax NNX Variable (told by its interface: Flax is not imported)."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def _unwrap(tree: PyTree) -> PyTree:
    """Replace the Variables in which `nnx.Optimizer` keeps state by their values."""

    def value(node: Any) -> Any:
        return _unwrap(node.get_value()) if _is_variable(node) else node

    return jax.tree.map(value, tree, is_leaf=_is_variable)


def find_states(opt_state: PyTree) -> list[SparseState]:
    """All `SparseState`s inside an optimizer state, in order."""
    is_state = lambda node: isinstance(node, SparseState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return [node for node in nodes if is_state(node)]


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
    states = find_states(opt_state)
    if len(states) != 1:
        raise ValueError(
            f"opt_state holds {len(states)} SparseStates, expected exactly 1: pass the state "
            "that the init of an optimizer with one dstee.transform() in it returned."
        )
    return _unwrap(states[0])


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
        raise ValueError(f"key={key!r} is not one PRNG key: pass jax.random.key(0).")


def copy_key(key: jax.Array) -> jax.Array:
    """A typed key in a buffer of its own, so that donating the state can't eat the caller's."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(key, copy=True))
    data = jnp.array(jax.random.key_data(key), copy=True)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
