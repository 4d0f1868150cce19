"""What `jax.export` must know to serialize programs that take an optimizer's state."""

import ast
from typing import Any

import jax
from jax import export

from dstee_jax.reparameterised.soft_threshold import Thresholded
from dstee_jax.state import RuleState, SparseState
from dstee_jax.trees import PyTree

# Which `jax.export` knows by itself.
_BUILTIN = (tuple, list, dict, type(None))


def register_for_export(opt_state: PyTree) -> None:
    """Register the types of an optimizer state's nodes with `jax.export`.

    The named tuples and dataclasses of optax, or of an optimizer of your own, without which
    neither `jax.export.export(...)(...).serialize()` nor, in another process,
    `jax.export.deserialize` takes a function of the state. Those of this library are registered
    when it is imported. A type that is registered already stays as it is.

    Args:
      opt_state: state, shapes (`jax.eval_shape(tx.init, params)`), or any tree that the exported
        function takes or returns.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> from jax import export
      >>> tx = dstee.transform(optax.adam(1e-2), sparsity=0.9, total_steps=1000,
      ...                      key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((20, 10))}
      >>> opt_state = tx.init(params)
      >>> dstee.register_for_export(opt_state)
      >>> data = export.export(jax.jit(tx.update))(params, opt_state, params).serialize()
      >>> updates, opt_state = export.deserialize(data).call(params, opt_state, params)
      >>> int(opt_state.count)
      1
    """
    left: list[Any] = [jax.tree.structure(opt_state)]
    while left:
        node = left.pop()
        left.extend(node.children())
        kind = node.node_data()
        if kind is not None and kind[0] not in _BUILTIN:
            register(kind[0])


def register(kind: type) -> None:
    """Register one type of node, under its full name."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            export.register_namedtuple_serialization(kind, serialized_name=name)
        else:
            export.register_pytree_node_serialization(
                kind,
                serialized_name=name,
                serialize_auxdata=lambda data: _written(name, data),
                deserialize_auxdata=lambda data: ast.literal_eval(data.decode()),
            )
    except ValueError as error:
        if "registration for type" not in str(error):  # but for another type of that name
            raise


def _written(name: str, data: Any) -> bytes:
    """Static fields of a node as a Python literal."""
    text = repr(data)
    try:
        same = ast.literal_eval(text) == data
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ValueError(
            f"a node of type {name} has the static fields {text}, which are no Python literals: "
            "register the type with jax.export.register_pytree_node_serialization."
        )
    return text.encode()


for _kind in (SparseState, RuleState, Thresholded):
    register(_kind)
