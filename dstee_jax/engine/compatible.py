"""Whether an optimizer's state is that of a given `transform`: `check`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine.config import Config
from dstee_jax.masks.counts import Count, LeafSpec
from dstee_jax.selection.parts import inner_axes, split
from dstee_jax.state import get_states
from dstee_jax.trees import (
    PyTree,
    expanded,
    is_dense,
    leaves_with_path,
    mask_leaves,
    path_name,
    unwrap,
)


def check(tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree) -> None:
    """Raise an error unless an optimizer state is one that this optimizer could have made.

    For a state from a checkpoint, or of an optimizer whose arguments have changed since: with
    another sparsity, distribution or `masks=` an update would go on with the counts of the state,
    silently. Compares structure, shapes and dtypes with those of `tx.init(params)`, and the
    number of active weights of each leaf and part. Counts that a plan changes over time are no
    difference. To change them on purpose, see `carry_over`.

    Args:
      tx: an optimizer with `dstee.transform` in it, or one without.
      opt_state: its state; concrete.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: something differs; names the leaf, and what was found and expected.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> make = lambda s: dstee.transform(
      ...     optax.sgd(0.1), sparsity=s, total_steps=200, key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> dstee.check(make(0.5), make(0.5).init(params), params)
      >>> dstee.check(make(0.5), make(0.75).init(params), params)
      Traceback (most recent call last):
        ...
      ValueError: kernel has 4 active weights in opt_state, where tx has 8: make tx with the ...
    """
    expected, configs = first_state(tx, params)
    _same_arrays(unwrap(opt_state), unwrap(expected))
    for state, config in zip(get_states(opt_state), configs, strict=True):
        layout, specs = config.layout(params)
        rows = zip(layout.leaves, mask_leaves(state.masks, params), specs, strict=True)
        for (path, leaf), mask, spec in rows:
            if spec is not None and config.rule.keeps_counts:
                found = active(expanded(mask, jnp.shape(leaf)), spec)
                _same_counts(path_name(path), found, spec.target)


def first_state(tx: optax.GradientTransformation, params: PyTree) -> tuple[PyTree, list[Config]]:
    """The shapes of `tx.init(params)`, and what each SparseState in it was asked for, in order."""
    with Config.watch() as configs:
        shapes = jax.eval_shape(lambda p: tx.init(p), params)  # a new function: it is traced anew
    return shapes, configs


def active(mask: jax.Array, spec: LeafSpec) -> Count:
    """How many weights of each part of a mask are active."""
    inner = inner_axes(mask.shape, spec.grid)
    counts = jax.jit(lambda m: jnp.sum(split(m, spec.grid), inner, dtype=jnp.uint32))(mask)
    return np.asarray(counts)


def _same_counts(name: str, found: Count, expected: Count) -> None:
    if not np.array_equal(found, expected):
        raise ValueError(
            f"{name} has {found} active weights in opt_state, where tx has {expected}: make tx "
            "with the sparsity, distribution and masks of the run that the state is from, or "
            "change them on purpose with dstee.carry_over(opt_state, tx, params)."
        )


def same_names(found: PyTree, expected: PyTree) -> None:
    """Raise a ValueError unless both have arrays of the same names."""
    names = [{name for name, _ in _arrays(tree)} for tree in (found, expected)]
    for more, which in ((names[0] - names[1], "opt_state"), (names[1] - names[0], "tx.init")):
        if more:
            raise ValueError(
                f"{which} alone has {sorted(more)[:3]}: the state is another optimizer's, or of "
                "other parameters."
            )


def _same_arrays(found: PyTree, expected: PyTree) -> None:
    same_names(found, expected)
    given = dict(_arrays(found))
    for name, kind in _arrays(expected):
        typed = jnp.issubdtype(given[name][1], jax.dtypes.prng_key)  # of an earlier version
        if given[name] != kind and not typed:
            raise ValueError(
                f"{name} has shape {given[name][0]} and dtype {given[name][1]} in opt_state, "
                f"where tx.init(params) has {kind[0]} and {kind[1]}: the state is another "
                "optimizer's, or of other parameters."
            )


def _arrays(tree: PyTree) -> list[tuple[str, tuple[Any, Any]]]:
    pairs = leaves_with_path(tree)
    return [(path_name(p), (jnp.shape(x), x.dtype)) for p, x in pairs if not is_dense(x)]
