"""What a round does with a leaf."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dstee_jax.masks.counts import LeafSpec, total
from dstee_jax.rules.plans import Plan
from dstee_jax.rules.scores import Score
from dstee_jax.rules.stacking import by_layer
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.exchange import Exchange
from dstee_jax.selection.largest import Selection
from dstee_jax.selection.parts import laid_as, whole
from dstee_jax.state import Leaf


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a round turns masks and counters into new ones."""

    drop: Score
    grow: Score
    plan: Plan
    structure: Structure | None
    regrow: bool
    counter_update: str
    selection: Selection

    def score(self, which: int, leaf: Leaf, spec: LeafSpec) -> jax.Array:
        """The drop score (0) or the grow score (1) of a leaf, each layer for itself."""
        score = (self.drop, self.grow)[which]
        leaf = leaf._replace(key=jax.random.fold_in(leaf.key, which))
        return by_layer(score, spec.stack)(leaf)

    @property
    def keeps_counts(self) -> bool:
        """Whether each leaf has as many active weights after a round as before it."""
        return self.plan.exchanges and (self.structure is None or self.structure.keeps_count)

    @property
    def searches_alone(self) -> bool:
        """Whether a structure exchanges leaf by leaf."""
        return self.structure is not None and self.structure.exchange is not None

    def exchange_alone(self, row: Exchange, spec: LeafSpec, name: str) -> jax.Array:
        """The new mask of one leaf whose structure searches for itself."""
        assert self.structure is not None
        alone, selection = self.structure.exchange, self.selection
        assert alone is not None
        active = total(spec.target) // math.prod(_layers(row.mask.shape, spec)[0])

        def one(mask: jax.Array, drop: jax.Array, grow: jax.Array, k: jax.Array) -> jax.Array:
            return alone(mask, drop, grow, k, row.k_max, active, name, self.regrow, selection)

        for i, axis in enumerate(spec.stack):
            one = jax.vmap(one, in_axes=(axis, axis, axis, i), out_axes=axis)
        mask, drop, grow = map(whole, row[:3])
        return laid_as(one(mask, drop, grow, _of_layers(row, spec)), row.mask)

    def reduce(self, row: Exchange, spec: LeafSpec, turn: jax.Array) -> Exchange:
        """What is exchanged in a leaf: its weights, or what its structure makes of them.

        `turn` is another number in each round.
        """
        if self.structure is None:
            return row
        reduce, parts = self.structure.reduce, self.structure.parts
        assert reduce is not None
        assert parts is not None
        for i, axis in reversed(list(enumerate(spec.stack))):
            reduce = jax.vmap(reduce, in_axes=axis - i)  # layers come first
        stacked, layer = _layers(row.mask.shape, spec)
        active = total(spec.target) // math.prod(stacked)
        grid, k, k_max = parts(layer, _of_layers(row, spec), row.k_max, active, turn)
        k = k.reshape([n for n in (*stacked, *grid) if n > 1])
        return Exchange(*reduce(*map(whole, row[:3])), (*stacked, *grid), k, None, k_max)

    def expand(self, new: jax.Array, row: Exchange, spec: LeafSpec) -> jax.Array:
        """The mask of a leaf from the new one of what was reduced."""
        if self.structure is None:
            return new
        of_layer, (_, layer) = self.structure.expand, _layers(row.mask.shape, spec)
        assert of_layer is not None

        def one(mask: jax.Array) -> jax.Array:
            return of_layer(mask, layer)

        for i, axis in reversed(list(enumerate(spec.stack))):
            one = jax.vmap(one, out_axes=axis - i)
        return one(new) if self.structure.tile else laid_as(one(new), row.mask)


def _layers(shape: tuple[int, ...], spec: LeafSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of the axes that stack layers, and the shape of a layer."""
    stacked = tuple(shape[axis] for axis in spec.stack)
    return stacked, tuple(n for axis, n in enumerate(shape) if axis not in spec.stack)


def _of_layers(row: Exchange, spec: LeafSpec) -> jax.Array:
    """How many weights each layer of a leaf exchanges; an axis for each that stacks layers."""
    k = jnp.broadcast_to(jnp.asarray(row.k), np.shape(spec.target))
    return k.reshape(_layers(row.mask.shape, spec)[0])
