"""`transform`: drop-and-grow as an optax transformation that keeps parameters sparse itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax import distributions, plans, scores
from dstee_jax import masks as masks_lib
from dstee_jax.distributions import Distribution
from dstee_jax.masks import Sparsity, Where, kernels
from dstee_jax.memory import Memory, first_rule_state, recall, remember
from dstee_jax.moments import merge
from dstee_jax.plans import Plan
from dstee_jax.rule import Rule, update_topology
from dstee_jax.schedule import DropFraction, Every, make_rounds
from dstee_jax.scores import Score
from dstee_jax.selection import Selection
from dstee_jax.state import (
    Leaf,
    LeafWithoutGrad,
    PyTree,
    SparseState,
    check_key,
    copy_key,
    is_dense,
    mask_leaves,
    replace_leaves,
)
from dstee_jax.structures import Structure


def transform(
    inner: optax.GradientTransformation | None = None,
    *,
    sparsity: Sparsity | None = None,
    total_steps: int,
    key: jax.Array,
    distribution: Distribution = distributions.erk,
    where: Where = kernels,
    masks: PyTree | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    drop_fraction: DropFraction = 0.3,
    every: Every | None = 100,
    start: float = 0.0,
    stop: float = 0.75,
    regrow: bool = False,
    update_weights: bool = False,
    plan: Plan | None = None,
    memory: Memory | None = None,
    penalty: Score | None = None,
    structure: Structure | None = None,
    counter_init: str = "masks",
    counter_update: str = "new",
    counter_dtype: Any = jnp.uint16,
    selection: Selection = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Dynamic sparse training, DST-EE by default, as an optax transformation.

    Every `every` steps, from each sparse leaf, the k active weights of lowest `drop` score are
    deactivated and the k inactive weights of highest `grow` score activated, at zero. On all
    steps the update of an inactive weight w is -w, so that after `optax.apply_updates` it is
    exactly zero (if it was finite). This holds only if nothing rescales the updates afterwards:
    `transform` wraps the whole optimizer (best) or is the last link of an `optax.chain`.

    With `inner`, the gradient that reaches it is masked, and what it keeps of inactive weights
    stays at the initial value. Without it, the updates that come down the chain are masked,
    and scores that read the gradient need it as the extra argument `grad=` (inside
    `optax.MultiSteps` that is the last micro-batch's: wrap the optimizer there).

    Weights whose score is NaN or infinite never grow. A mask step on which no gradient is finite
    exchanges nothing and, like any mask step, updates nothing.

    Args:
      inner: the optimizer to wrap, None as the last link of a chain.
      sparsity: share of zeros in all selected leaves together, in [0, 1); or a dict from path
        to sparsity.
      total_steps: number of calls of `update` in the whole training.
      key: PRNG key for the first masks and for random scores; copied.
      distribution: `erk`, `uniform`, or a function like them.
      where: `(path, leaf) -> bool`, which leaves are sparse; default `kernels`.
      masks: concrete masks to start from, instead of `sparsity` (whose `distribution` and
        `where` they replace): a bool array for each sparse leaf, `optax.MaskedNode()` for each
        dense one. Copied. Their counts are kept for the whole run.
      drop: score of the weights to drop (lowest first); default `scores.magnitude()`.
      grow: score of the weights to grow (highest first); default `scores.acquisition()`.
      drop_fraction: share of a leaf's active weights dropped in a round. A number in [0, 1] is
        where a cosine that ends at zero at `stop` starts; a callable is an optax schedule of
        the step. k = floor(fraction * active), at least 1 while the fraction is above 0.
      every: steps between rounds (the paper's ΔT), at least 1; None for no rounds at all; a
        callable takes a mask step (0 at first) and returns the steps until the next.
      start: share of `total_steps` before which there is no round, in [0, 1].
      stop: share of `total_steps` after which there is no round, in [start, 1].
      regrow: whether a weight dropped in a round may be grown in it.
      update_weights: take an optimizer step on mask steps too, before the masks change. By
        default no parameter is updated on a mask step, and the inner optimizer's moments
        stand still while its step counts go on.
      plan: how many weights each leaf drops and grows; default `plans.exchange()`, which keeps
        the count of every leaf. With another plan `sparsity` is what the plan aims at.
      memory: what the method keeps of its own for each weight, as `memory.dense_momentum()`;
        scores find it in `leaf.rule_state`.
      penalty: a function of a leaf, as a score is, added to the gradient of active weights
        before it reaches `inner`: the gradient of a regulariser, or noise. Needs `inner`.
      structure: which masks are allowed, as `structures.n_m(2, 4)`; default any. Needs the
        default plan.
      counter_init: `'masks'`: counters start at the first mask; `'zeros'`: at zero (then
        `exploration_degree` does not see the first mask).
      counter_update: `'new'`: a round adds the new mask to the counters; `'old'`: the mask
        before it.
      counter_dtype: unsigned integer type; counters saturate.
      selection: `'auto'`, `'top_k'` or `'bisection'`; take `'bisection'` for arrays that are
        sharded over Auto mesh axes.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SparseState`. Its `update` needs
      `params`; extra arguments go on to `inner`.

    Raises:
      ValueError: an argument is out of range (here), or params, gradients and masks do not fit
        together (in `init` and `update`).

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> tx = dstee.transform(optax.adam(1e-2), sparsity=0.9, total_steps=1000,
      ...                      key=jax.random.key(0))
      >>> params = {"kernel": jnp.ones((20, 10))}
      >>> opt_state = tx.init(params)
      >>> params = dstee.apply_masks(params, opt_state)
      >>> grads = jax.grad(lambda p: (p["kernel"] ** 2).sum())(params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum())
      20

    References:
      Huang et al., "Dynamic Sparse Training via More Exploration", 2022, Algorithm 1.

    Deviations:
      Where the text and Algorithm 1 differ, the default is: counters start at the first mask
      and add the new mask after each round; the growth term is the absolute gradient;
      just-dropped weights are not regrown, since inactive weights alone have a finite score;
      t counts from 1. The paper runs rounds to the end of training and gives no value for c,
      the drop fraction and ΔT; the defaults here are measured (see the README).
    """
    _check_choice("counter_init", counter_init, ("masks", "zeros"))
    _check_choice("counter_update", counter_update, ("new", "old"))
    _check_choice("selection", selection, ("auto", "top_k", "bisection"))
    if not jnp.issubdtype(counter_dtype, jnp.unsignedinteger):
        raise ValueError(f"counter_dtype={counter_dtype} must be unsigned, as jnp.uint16.")
    if sparsity is None and masks is None:
        raise ValueError("sparsity=None without masks=: give one of them, as sparsity=0.95.")
    if sparsity is not None and masks is not None:
        raise ValueError("sparsity= and masks= both say how many weights are active: give one.")
    if inner is not None and not hasattr(inner, "update"):
        raise ValueError(f"inner={inner!r} is not an optimizer: call it, as optax.adam(1e-3).")
    check_key(key)
    distributions.check_sparsity(sparsity)
    target: Sparsity = 0.0 if sparsity is None else sparsity
    if penalty is not None and inner is None:
        raise ValueError("penalty= changes the gradient that reaches inner: give an optimizer.")
    if structure is not None and plan is not None and not plan.exchanges:
        raise ValueError("structure= keeps the count of every leaf: leave plan= out.")
    if masks is not None:
        masks = masks_lib.given_masks(masks, fixed=every is None, structure=structure)
    rounds = make_rounds(total_steps, drop_fraction, every, start, stop)
    if every == 1 and not update_weights:
        raise ValueError(
            "every=1 makes each step a mask step, which by default updates no weight: pass "
            "update_weights=True, or a larger every."
        )
    rule = Rule(
        drop=scores.magnitude() if drop is None else drop,
        grow=scores.acquisition() if grow is None else grow,
        plan=plans.exchange() if plan is None else plan,
        memory=memory,
        structure=structure,
        regrow=regrow,
        counter_update=counter_update,
        selection=selection,
    )
    wrapped = None if inner is None else optax.with_extra_args_support(inner)

    def counts_of(params: PyTree) -> tuple[list[int | None], list[int | None]]:
        """Active weights of each leaf at the asked sparsity and at step 0, None where dense."""
        if masks is not None:
            given = mask_leaves(masks, params)
            traced = [isinstance(mask, jax.core.Tracer) for mask in given]
            known = [
                None if is_dense(mask) or t else int(mask.sum())
                for mask, t in zip(given, traced, strict=True)
            ]
            return known, known

        def spread(sparsity: Sparsity) -> list[int | None]:
            return masks_lib.leaf_counts(params, sparsity, distribution, where, structure)

        return spread(target), rule.plan.first_counts(params, spread(target), spread)

    def init(params: PyTree) -> SparseState:
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # optax.tree.map_params asks with a placeholder that has no leaves
            first = counters = params
        else:
            if masks is None:
                first = masks_lib.masks_of_counts(params, counts_of(params)[1], key, structure)
            else:
                masks_lib.check_masks(masks, params)
                given = mask_leaves(masks, params)
                given = [m if is_dense(m) else jnp.array(m) for m in given]
                first = jax.tree.unflatten(treedef, given)
            begin = jnp.array if counter_init == "masks" else jnp.zeros_like
            counters = jax.tree.map(lambda m: begin(m, counter_dtype), first)
        return SparseState(
            count=jnp.zeros((), jnp.int32),
            key=copy_key(key),
            masks=first,
            counters=counters,
            rule_state=first_rule_state(memory, rule.plan.init(), params, first, key),
            inner_state=() if wrapped is None else wrapped.init(params),
        )

    def update(
        updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "dstee.transform needs the parameters: call tx.update(grads, opt_state, params)."
            )
        leaves, treedef = jax.tree.flatten(params)
        weights = [jnp.asarray(leaf) for leaf in leaves]
        grads = updates if wrapped is not None else extra.get("grad")
        outgoing = _leaves_like(treedef, updates, "grads")
        dense_grads: list[Any] = [None] * len(weights)
        if grads is not None:
            dense_grads = _leaves_like(treedef, grads, "grad=")
        masks_now = mask_leaves(state.masks, params)
        counters = mask_leaves(state.counters, params)
        targets, starts = counts_of(params)
        # A mask that is all ones for ever costs nothing: its leaf is treated as dense.
        stays = rule.plan.exchanges
        full = [stays and n == w.size for n, w in zip(targets, weights, strict=True)]
        old = [optax.MaskedNode() if f else m for f, m in zip(full, masks_now, strict=True)]
        count = optax.safe_increment(state.count)
        kept, plan_state = recall(state.rule_state, params)

        def view(i: int, param: jax.Array) -> Leaf:
            return (Leaf if dense_grads[i] is not None else LeafWithoutGrad)(
                param=_masked(masks_now[i], param),
                grad=dense_grads[i],
                mask=masks_now[i],
                counter=counters[i],
                key=jax.random.fold_in(jax.random.fold_in(state.key, count), i),
                count=count,
                rule_state=kept[i],
                target=targets[i],
            )

        sparse = [i for i, mask in enumerate(masks_now) if not is_dense(mask)]
        if penalty is not None:
            for i in sparse:
                leaf = view(i, weights[i])
                term = penalty(leaf._replace(key=jax.random.fold_in(leaf.key, 2)))
                outgoing[i] = outgoing[i] + term.astype(outgoing[i].dtype)
        if memory is not None:
            for i in sparse:
                kept[i] = memory.update(view(i, weights[i]))

        outgoing = [_masked(m, u) for m, u in zip(old, outgoing, strict=True)]
        inner_state = state.inner_state
        if wrapped is not None:
            active_grads = jax.tree.unflatten(treedef, outgoing)
            step, inner_state = wrapped.update(active_grads, inner_state, params, **extra)
            outgoing = jax.tree.leaves(step)

        def moved(i: int) -> Leaf:
            w = weights[i]
            return view(i, w + outgoing[i].astype(w.dtype) if update_weights else w)

        is_round, new, counters, plan_state = update_topology(
            rule, rounds, targets, starts, moved, masks_now, counters, count, plan_state
        )
        # Alive: active before and after. What has just grown starts at zero, like the rest.
        alive = [m if is_dense(m) else m & n for m, n in zip(old, new, strict=True)]
        frozen = False if update_weights else is_round
        emitted = [_emit(*row, frozen) for row in zip(alive, outgoing, weights, strict=True)]
        if wrapped is not None:
            start_params = jax.tree.unflatten(treedef, map(_masked, alive, weights))
            inner_state = merge(
                inner_state,
                state.inner_state,
                wrapped.init(start_params),
                params,
                functools.partial(_moment, alive, frozen),
            )
        return jax.tree.unflatten(treedef, emitted), SparseState(
            count=count,
            key=state.key,
            masks=replace_leaves(state.masks, params, new),
            counters=replace_leaves(state.counters, params, counters),
            rule_state=remember(state.rule_state, params, kept, plan_state),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _masked(mask: Any, x: jax.Array) -> jax.Array:
    """Zero where the mask is False; x itself for a dense leaf."""
    return x if is_dense(mask) else jnp.where(mask, x, jnp.zeros_like(x))


def _freeze(frozen: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` on a mask step; `new` itself, with no select, where there can be none."""
    return new if frozen is False else jnp.where(frozen, old, new)


def _emit(alive: Any, update: jax.Array, weight: jax.Array, frozen: Any) -> jax.Array:
    """The update of one leaf: -weight where not alive, nothing at all on a mask step."""
    update = _freeze(frozen, update, jnp.zeros_like(update))
    if is_dense(alive):
        return update
    exact = jnp.promote_types(update.dtype, weight.dtype)  # a narrower -weight would not cancel
    return jnp.where(alive, update.astype(exact), -weight.astype(exact))


def _moment(
    alive: list[Any], frozen: Any, i: int, new: jax.Array, old: jax.Array, initial: jax.Array
) -> jax.Array:
    """A moment of leaf i: as it was on a mask step, its initial value where not alive."""
    moment = _freeze(frozen, new, old)
    return moment if is_dense(alive[i]) else jnp.where(alive[i], moment, initial)


def _leaves_like(treedef: Any, tree: PyTree, what: str) -> list[jax.Array]:
    if jax.tree.structure(tree) != treedef:
        raise ValueError(
            f"{what} and params have different structures, {jax.tree.structure(tree)} and "
            f"{treedef}: differentiate with respect to these params."
        )
    return jax.tree.leaves(tree)


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r} is unknown: choose from {valid}.")
