"""`transform`: drop-and-grow as an optax transformation that keeps parameters sparse itself."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import as_numbers, check_flag, check_function, check_made, is_number, shown
from dstee_jax.engine.checks import check_restart, warn_of_packed
from dstee_jax.engine.config import Config
from dstee_jax.engine.rule import Rule
from dstee_jax.engine.update import update
from dstee_jax.masks import distributions, given
from dstee_jax.masks.counts import Blocks, Sparsity, StackAxes, Where
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.where import kernels
from dstee_jax.rules import plans, scores
from dstee_jax.rules.memory import Memory
from dstee_jax.rules.plans import Plan
from dstee_jax.rules.schedule import DropFraction, Every, make_rounds
from dstee_jax.rules.scores import Score
from dstee_jax.rules.structures import Structure
from dstee_jax.selection.largest import Selection, check_selection
from dstee_jax.state import check_key
from dstee_jax.trees import PyTree


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
    scale: Score | None = None,
    structure: Structure | None = None,
    counter_init: str = "masks",
    counter_update: str = "new",
    counter_dtype: Any = jnp.uint16,
    selection: Selection = "auto",
    stack_axes: StackAxes | None = None,
    blocks: Blocks | None = None,
    packed: bool = False,
    indices: bool = False,
    grow_batches: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Dynamic sparse training, DST-EE by default, as an optax transformation.

    Every `every` steps, from each sparse leaf, the k active weights of lowest `drop` score are
    deactivated and the k inactive weights of highest `grow` score activated, at zero. On all
    steps the update of an inactive weight w is -w, so that after `optax.apply_updates` it is
    exactly zero (if it was finite). This holds only if nothing rescales the updates afterwards:
    `transform` wraps the whole optimizer (best) or is the last link of an `optax.chain`.

    With `inner`, the gradient that reaches it is masked; what it keeps of inactive weights is not
    looked at, and a mask step starts that of what it drops and grows anew. Without it, the updates
    that come down the chain are masked, and scores that read the gradient need it as the extra
    argument `grad=` (inside `optax.MultiSteps` that is the last micro-batch's: wrap the optimizer
    there).

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
      every: steps between rounds (the paper's ΔT), at least 2 (1 with `update_weights`); None for
        no rounds at all; a callable takes a mask step (0 at first) and returns the steps until
        the next.
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
      scale: a function of a leaf, as a score is, that multiplies the updates of active weights
        after `inner`, as `scales.warm_up(100)`, so that what has just grown starts slowly. Takes 4
        bytes a weight, for the step at which it was grown. Not with `packed`.
      structure: which masks are allowed, as `structures.tiles((32, 32))`; default any. Needs
        a plan that exchanges, as the default does.
      counter_init: `'masks'`: counters start at the first mask; `'zeros'`: at zero (then
        `exploration_degree` does not see the first mask).
      counter_update: `'new'`: a round adds the new mask to the counters; `'old'`: the mask
        before it.
      counter_dtype: unsigned integer type; counters saturate.
      selection: of `drop_and_grow`: same result, different cost. Take `'sharded'` for parameters
        that are split over Auto mesh axes; Explicit ones are seen.
      stack_axes: `(path, leaf) -> axes` that stack layers, as the first one of a scanned
        block: `lambda path, leaf: (0,) if "blocks" in str(path) else ()`. Each layer keeps its
        own count, and `where`, the distribution and the scores see it as a leaf of its own.
      blocks: `(path, leaf) -> parts` of each axis, as (8, 1): each of the equal blocks keeps
        its own count, and what is done within a block stays on the device that holds it. For
        packed leaves that are sharded (`dstee.blocks_of`). It changes the masks, whatever the
        number of devices. Asked of sparse leaves alone.
      packed: `inner` sees, and keeps moments for, the active weights only. Its state's leaves
        must be scalars or have one value for each weight. Mask steps carry the moments of
        surviving weights over. Same masks and parameters, if `inner` treats weights one by one
        or by norms of a whole leaf or tree; not if it takes means over a leaf or an axis, or
        draws noise (`optax.centralize`, `adaptive_grad_clip`, `clip_by_block_rms`). Differentiating
        through `update` in reverse needs `mask_step=False`.
      indices: keep the positions of the active weights in the state, 4 bytes each, for
        `dstee.pmean`; `packed` has them anyway.
      grow_batches: rounds see the mean gradient of the last n steps, the mask step's among
        them, in place of the mask step's own. At most `every`. Takes 4 bytes a weight.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SparseState`. Its `update` needs
      `params`, and takes `mask_step` (`dstee.apply` explains it); other extra arguments go on to
      `inner`.

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
      the drop fraction and ΔT; the defaults here are measured (docs/defaults.md).
    """
    _check_kinds(
        drop=drop,
        grow=grow,
        penalty=penalty,
        scale=scale,
        plan=plan,
        memory=memory,
        structure=structure,
    )
    check_function("where", where, "a path and a leaf", "dstee.kernels", inputs=2)
    check_function("distribution", distribution, "shapes and a sparsity", "dstee.erk", inputs=2)
    flags = {"regrow": regrow, "update_weights": update_weights, "packed": packed}
    for name, value in (flags | {"indices": indices}).items():
        check_flag(name, value)
    _check_choice("counter_init", counter_init, ("masks", "zeros"))
    _check_choice("counter_update", counter_update, ("new", "old"))
    check_selection(selection)
    if not _is_unsigned(counter_dtype):
        raise ValueError(f"counter_dtype={shown(counter_dtype)} must be unsigned, as jnp.uint16.")
    if sparsity is None and masks is None:
        raise ValueError("sparsity=None without masks=: give one of them, as sparsity=0.95.")
    if sparsity is not None and masks is not None:
        raise ValueError("sparsity= and masks= both say how many weights are active: give one.")
    if inner is not None and not hasattr(inner, "update"):
        raise ValueError(f"inner={shown(inner)} is not an optimizer: call it, as optax.adam(1e-3).")
    check_key(key)
    distributions.check_sparsity(sparsity)
    if penalty is not None and inner is None:
        raise ValueError("penalty= changes the gradient that reaches inner: give an optimizer.")
    if structure is not None and plan is not None and not plan.exchanges:
        raise ValueError("structure= keeps the count of every leaf: leave plan= out.")
    if masks is not None:
        masks = given.given_masks(masks, fixed=every is None)
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
        structure=structure,
        regrow=regrow,
        counter_update=counter_update,
        selection=selection,
    )
    if packed and inner is None:
        raise ValueError("packed=True is about inner's state: give an optimizer to transform.")
    if packed and scale is not None:
        raise ValueError(
            "scale= looks at all weights of a leaf, packed=True at the active ones: leave one of "
            "them out."
        )
    if (packed or indices) and not rule.keeps_counts:
        raise ValueError(
            "packed=True and indices=True need a plan that exchanges, and a structure without "
            "ablation, so that counts stay: leave them out."
        )
    if not is_number(grow_batches) or grow_batches != int(grow_batches) or grow_batches < 1:
        raise ValueError(f"grow_batches={shown(grow_batches)} must be an integer of 1 or more.")
    if grow_batches > 1 and every is None:
        raise ValueError(f"grow_batches={grow_batches} and every=None: there is no round to grow.")
    if grow_batches > 1 and grow_batches > rounds.shortest:
        raise ValueError(
            f"grow_batches={grow_batches} is more than the {rounds.shortest} steps between "
            "rounds: lower it, or raise every."
        )
    config = Config(
        inner=None if inner is None else optax.with_extra_args_support(inner),
        rule=rule,
        rounds=rounds,
        key=key,
        sparsity=as_numbers(0.0 if sparsity is None else sparsity),
        distribution=distribution,
        where=where,
        masks=masks,
        stack_axes=stack_axes,
        blocks=blocks,
        memory=memory,
        penalty=penalty,
        scale=scale,
        update_weights=update_weights,
        packed=packed,
        indices=packed or indices or bool(structure is not None and structure.tile),
        grow_batches=int(grow_batches),
        counter_init=counter_init,
        counter_dtype=counter_dtype,
    )
    if inner is not None and every is not None:
        check_restart(inner)
    if packed and not config.tiled:
        warn_of_packed()
    return optax.GradientTransformationExtraArgs(config.init, functools.partial(update, config))


def mask_steps_of(tx: optax.GradientTransformation) -> Sequence[int]:
    """The mask steps of a `transform`: calls of its `update`, from 1, in order; none for no rounds.

    As `mask_steps`, where a method has chosen `every`, `start` and `stop`: for a training loop
    that has a program without mask steps.

    Args:
      tx: what `transform` or a method of `dstee.methods` returned. Within an `optax.chain` or
        `optax.MultiSteps` ask that, not the whole.

    Raises:
      ValueError: tx is something else.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.methods.set_itop(
      ...     optax.sgd(0.1), sparsity=0.9, total_steps=4000, key=jax.random.key(0))
      >>> list(dstee.mask_steps_of(tx))
      [1500, 3000]
    """
    asked = _asked(tx)
    return asked.rounds.all_steps if asked.rounds.every else ()


def dense_steps_of(tx: optax.GradientTransformation) -> Sequence[int]:
    """The steps of a `transform` that read gradients of inactive weights, in order, from 1.

    On all others parameters and gradients may be rectangles of tiles (`dstee.to_tiles`), on mask
    steps rectangles with candidates (`dstee.tiles`). They are the mask steps; with
    `grow_batches=n` the n - 1 steps before each too; with `memory=` every step.

    Args:
      tx: as for `mask_steps_of`.

    Raises:
      ValueError: tx is something else.

    Example:
      >>> import dstee_jax as dstee, jax, optax
      >>> tx = dstee.transform(optax.sgd(0.1), sparsity=0.9, total_steps=400, grow_batches=2,
      ...                      key=jax.random.key(0))
      >>> list(dstee.dense_steps_of(tx))
      [99, 100, 199, 200, 299, 300]
    """
    asked, rounds = _asked(tx), mask_steps_of(tx)
    if asked.memory is not None:
        return range(1, asked.rounds.total_steps + 1)
    return sorted({at - i for at in rounds for i in range(asked.grow_batches) if at > i})


def _asked(tx: optax.GradientTransformation) -> Config:
    asked = tx.update.args[0] if isinstance(tx.update, functools.partial) else None
    if not isinstance(asked, Config):
        raise ValueError(
            f"{tx} is not from dstee.transform or dstee.methods: pass the transform that the "
            "chain, or the wrapper, was made of."
        )
    return asked


def _is_unsigned(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.unsignedinteger))
    except TypeError:  # no dtype at all
        return False


def _check_kinds(*, plan: Any, memory: Any, structure: Any, **of_leaf: Any) -> None:
    """Raise a ValueError for a part of a rule that is of another kind, or was not called."""
    examples = {"grow": "dstee.scores.gradient()", "drop": "dstee.scores.magnitude()"}
    examples |= {"scale": "dstee.scales.warm_up()", "penalty": "dstee.penalties.l1_with_noise()"}
    for name, value in of_leaf.items():
        if value is not None:
            check_function(name, value, "one leaf", examples[name])
    check_made("plan", plan, plans.Plan, "dstee.plans.exchange()")
    check_made("memory", memory, Memory, "dstee.memory.dense_momentum()")
    check_made("structure", structure, Structure, "dstee.structures.constant_fan_in()")


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}={shown(value)} is unknown: choose from {valid}.")
