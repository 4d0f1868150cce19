"""What `transform` was asked for, how leaves are cut and counted, and the first state."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine import packing
from dstee_jax.engine.checks import check_matching
from dstee_jax.engine.rule import Rule
from dstee_jax.masks import given
from dstee_jax.masks.counts import (
    Blocks,
    Layout,
    LeafSpec,
    Sparsity,
    StackAxes,
    Where,
    check_parts,
    leaf_counts,
    total,
)
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.random import masks_of_counts
from dstee_jax.rules.memory import Memory, first_rule_state
from dstee_jax.rules.schedule import Rounds
from dstee_jax.rules.scores import Score
from dstee_jax.state import SparseState, key_data
from dstee_jax.tiling.tiles import index_of
from dstee_jax.trees import PyTree, is_dense, mask_leaves, masked

_WATCHED: contextvars.ContextVar[list["Config"] | None] = contextvars.ContextVar(
    "watched", default=None
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What `transform` was asked for, checked."""

    inner: optax.GradientTransformationExtraArgs | None
    rule: Rule
    rounds: Rounds
    key: jax.Array
    sparsity: Sparsity
    distribution: Distribution
    where: Where
    masks: PyTree | None
    stack_axes: StackAxes | None
    blocks: Blocks | None
    memory: Memory | None
    penalty: Score | None
    scale: Score | None
    update_weights: bool
    packed: bool
    indices: bool
    grow_batches: int
    counter_init: str
    counter_dtype: Any

    def layout(self, params: PyTree) -> tuple[Layout, list[Any]]:
        """How leaves are cut, and the counts of each: None where dense or masks are traced."""
        layout, plan = Layout(params, self.stack_axes, self.blocks), self.rule.plan
        if self.masks is not None:
            masks = self._given_masks(params)
            targets: list[Any] = [
                None if is_dense(m) or isinstance(m, jax.core.Tracer) else layout.of_mask(i, m)
                for i, m in enumerate(masks)
            ]
            starts: list[Any] = targets
        else:

            def spread(sparsity: Sparsity) -> list[Any]:
                args = (sparsity, self.distribution, self.where, self.rule.structure, layout)
                return leaf_counts(params, *args)

            targets = spread(self.sparsity)
            starts = plan.first_counts(params, targets, spread)
        specs: list[LeafSpec | None] = [
            None if target is None else LeafSpec(target, start, layout.grid(i), layout.stacks[i])
            for i, (target, start) in enumerate(zip(targets, starts, strict=True))
        ]
        check_parts(layout, specs, plan.exchanges, self.rule.structure, self.indices)
        return layout, specs

    def full(self, params: PyTree, specs: list[LeafSpec | None]) -> list[bool]:
        """Whether a leaf's mask is all ones for ever: then it costs nothing, as a dense leaf."""
        sizes = [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]
        return [
            self.rule.plan.exchanges and spec is not None and total(spec.target) == size
            for spec, size in zip(specs, sizes, strict=True)
        ]

    def moves(self, specs: list[LeafSpec | None], masks: list[Any], leaves: list[Any]) -> bool:
        """Whether any step can be a mask step; of these masks of the parameters' leaves."""
        sparse = [i for i, mask in enumerate(masks) if not is_dense(mask)]
        # Masks of unknown counts are traced ones, which never change.
        known = [(spec, jnp.size(leaves[i])) for i in sparse if (spec := specs[i]) is not None]
        movable = any(0 < total(spec.target) < size for spec, size in known)
        drops = self.rounds.highest > 0 or not self.rule.plan.exchanges
        return len(known) == len(sparse) and movable and bool(self.rounds.every) and drops

    def needs_dense(self, count: jax.Array) -> jax.Array:
        """Whether update number `count` reads the gradient of inactive weights; bool, ()."""
        if self.memory is not None:
            return jnp.ones((), bool)
        return self.rounds.until(count) < self.grow_batches

    @staticmethod
    @contextlib.contextmanager
    def watch() -> Iterator[list["Config"]]:
        """While it lasts, the list gets what is asked for wherever an `init` is called."""
        found: list[Config] = []
        token = _WATCHED.set(found)
        try:
            yield found
        finally:
            _WATCHED.reset(token)

    def init(self, params: PyTree) -> SparseState:
        """The state before the first step."""
        if (watched := _WATCHED.get()) is not None:
            watched.append(self)
        seen = where_active = params
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            first = counters = params
        else:
            layout, specs = self.layout(params)
            first = self._first_masks(params, layout, specs)
            begin = jnp.array if self.counter_init == "masks" else jnp.zeros_like
            counters = jax.tree.map(lambda m: begin(m, self.counter_dtype), first)
            leaves = zip(mask_leaves(first, params), jax.tree.leaves(params), strict=True)
            masked_leaves = [masked(mask, jnp.asarray(leaf)) for mask, leaf in leaves]
            seen = jax.tree.unflatten(jax.tree.structure(params), masked_leaves)
            if self.indices:
                where_active = self.first_indices(params, first, specs)
            if self.packed:
                seen = packing.pack(seen, self.places(params, first, where_active))
                packing.check_state(self.inner, params, seen)
            elif self.inner is not None and self.moves(
                specs, mask_leaves(first, params), jax.tree.leaves(params)
            ):
                check_matching(self.inner, params)
        plan_state = self.rule.plan.init()
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            key=key_data(self.key),
            masks=first,
            counters=counters,
            rule_state=first_rule_state(
                self.memory,
                plan_state,
                params,
                first,
                self.key,
                self.grow_batches > 1,
                self.scale is not None,
            ),
            inner_state=() if self.inner is None else self.inner.init(seen),
            needs_dense=self.needs_dense(jnp.ones((), jnp.int32)),
            indices=where_active if self.indices else (),
            tile_sizes=self._tile_sizes(params, first) if self.tiled else (),
        )

    @property
    def tiled(self) -> bool:
        """Whether masks and counters are kept for tiles."""
        return self.rule.structure is not None and bool(self.rule.structure.tile)

    def places(self, params: PyTree, masks: PyTree, indices: PyTree) -> list[Any]:
        """Where the active weights of each leaf are, from what the state keeps."""
        rows = zip(
            mask_leaves(indices, params),
            mask_leaves(masks, params),
            jax.tree.leaves(params),
            strict=True,
        )
        return [packing.place(index, mask, jnp.shape(leaf)) for index, mask, leaf in rows]

    def _given_masks(self, params: PyTree) -> list[Any]:
        """The masks of `masks=`; those of tiles as masks of weights."""
        masks = given.of_weights(self.masks, params) if self.tiled else self.masks
        given.check_masks(masks, params)
        return mask_leaves(masks, params)

    def _tile_sizes(self, params: PyTree, masks: PyTree) -> PyTree:
        """How many weights an entry of each mask stands for."""
        leaves, treedef = jax.tree.flatten(params)
        rows = zip(mask_leaves(masks, params), leaves, strict=True)
        sizes = [m if is_dense(m) else jnp.int32(x.size // max(m.size, 1)) for m, x in rows]
        return jax.tree.unflatten(treedef, sizes)

    def _first_masks(self, params: PyTree, layout: Layout, specs: list[LeafSpec | None]) -> PyTree:
        structure = self.rule.structure
        if self.masks is None:
            starts = [None if spec is None else spec.start for spec in specs]
            return masks_of_counts(params, starts, self.key, structure, layout)
        leaves, treedef = jax.tree.flatten(params)
        masks = self._given_masks(params)
        if structure is not None:
            rows = zip(layout.leaves, masks, layout.stacks, strict=True)
            for (path, _), mask, axes in rows:
                given.check_structure(structure, path, mask, axes)
        if self.tiled:
            return jax.tree.unflatten(treedef, list(map(self.of_tiles, masks, layout.stacks)))
        pairs = zip(masks, leaves, strict=True)
        laid = [m if is_dense(m) else given.lay(m, x) for m, x in pairs]
        return jax.tree.unflatten(treedef, laid)

    def of_tiles(self, mask: Any, stack: tuple[int, ...]) -> Any:
        """A mask of weights as the state keeps it; with tiles, of tiles."""
        structure = self.rule.structure
        if is_dense(mask) or structure is None or not structure.tile:
            return mask
        assert structure.reduce is not None
        reduce: Any = structure.reduce
        for _ in stack:
            reduce = jax.vmap(reduce)
        return reduce(*[jnp.asarray(mask)] * 3)[0]

    def first_indices(self, params: PyTree, masks: PyTree, specs: list[LeafSpec | None]) -> PyTree:
        """Where the active weights of each leaf are, as `SparseState.indices` has it."""
        leaves, treedef = jax.tree.flatten(params)
        rows = zip(mask_leaves(masks, params), specs, leaves, self.full(params, specs), strict=True)
        return jax.tree.unflatten(treedef, [self._positions(*row) for row in rows])

    def _positions(self, mask: Any, spec: LeafSpec | None, leaf: Any, full: bool) -> Any:
        if is_dense(mask) or (full and not self.tiled):
            return optax.MaskedNode()
        if spec is None:
            raise ValueError(
                "packed=True, indices=True and tiles need the counts of active weights when the "
                "step is compiled, and masks= is traced: make the masks outside jit and vmap."
            )
        if not self.tiled:
            return packing.positions(mask, int(np.max(spec.target)), spec.grid)
        stack = len(spec.stack)
        *_, rows, columns = mask.shape
        active = total(spec.target) * rows // leaf.size
        return index_of(mask, (*mask.shape[:stack], columns, active))
