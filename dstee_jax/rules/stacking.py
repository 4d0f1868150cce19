"""Stacked leaves: each layer is seen as a leaf of its own."""

from typing import Any

import jax

from dstee_jax.rules.scores import Score
from dstee_jax.state import Leaf


def by_layer(score: Score, axes: tuple[int, ...]) -> Score:
    """A score that treats each index along `axes` of a leaf as a leaf of its own."""
    if not axes:
        return score
    *others, axis = sorted(axes)
    of_layer = by_layer(score, tuple(others))

    def of_stack(leaf: Leaf) -> jax.Array:
        from_end = axis - leaf.param.ndim  # a memory may have axes before the leaf's own
        places = dict(
            param=axis,
            grad=None if leaf[1] is None else axis,
            mask=axis,
            counter=axis,
            key=0,
            count=None,
            rule_state=jax.tree.map(lambda _: from_end, leaf.rule_state),
            target=None,
            grown=jax.tree.map(lambda _: from_end, leaf.grown),
        )
        in_axes: Any = leaf._replace(**places)  # type: ignore[arg-type]
        keys = jax.random.split(leaf.key, leaf.param.shape[axis])
        return jax.vmap(
            lambda layer: of_layer(layer._replace(target=leaf.target)),
            in_axes=(in_axes,),
            out_axes=from_end,
        )(leaf._replace(key=keys, target=None))

    return of_stack
