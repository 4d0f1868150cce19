"""Every optimizer of optax and optax.contrib inside `dstee.transform`, over three mask steps.

What a mask step does to a state is checked against a loop that calls the optimizer itself, with
leaves of its state found by their paths (the library goes by shapes).

`python -m tests.test_optimizers` writes the table in docs/optimizers.md.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import dstee_jax as dstee

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
MARKS = "<!-- python -m tests.test_optimizers -->", "<!-- end of the table -->"
KEY = jax.random.key(0)
RATE = 0.01
STEPS, MASK_STEPS = 10, (3, 6, 9)


class Row(NamedTuple):
    """What is said about an optimizer.

    Attributes:
      make: makes it; None calls the function of that name with a learning rate.
      extra: extra arguments of its `update`.
      limit: with `update_weights=True` it is right, by default not quite.
      refused: what the error says.
      remark: for the table.
    """

    make: Callable | None = None
    extra: tuple[str, ...] = ()
    limit: bool = False
    refused: str = ""
    remark: str = ""


def by_label(params):
    return jax.tree.map(lambda x: "matrix" if jnp.ndim(x) > 1 else "vector", params)


def matrices(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def sam():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(RATE), adversary, sync_period=2)


SAM = "an integer in its state is a phase, which goes on where a mask step takes the step's place"
LEAF = "keeps one number for a whole leaf"
FACTORED = "as it is"
LINESEARCH = (
    "compute the gradient afresh: `optax.value_and_grad_from_state` has that of other masks"
)
EXAMPLES = "takes the gradients of single examples: put it before `transform` in an `optax.chain`"

OPTIMIZERS = {
    "optax.adabelief": Row(),
    "optax.adadelta": Row(),
    "optax.adafactor": Row(),
    "optax.adafactor(min_dim_size_to_factor=4)": Row(
        lambda: optax.adafactor(RATE, min_dim_size_to_factor=4),
        remark="factored statistics, which its default has from 128 rows and columns on",
    ),
    "optax.adagrad": Row(),
    "optax.adam": Row(),
    "optax.adamax": Row(),
    "optax.adamaxw": Row(),
    "optax.adamw": Row(),
    "optax.adan": Row(),
    "optax.amsgrad": Row(),
    "optax.fromage": Row(),
    "optax.lamb": Row(),
    "optax.lars": Row(),
    "optax.lbfgs": Row(refused="several values for each weight", remark="memories of many steps"),
    "optax.lion": Row(),
    "optax.nadam": Row(),
    "optax.nadamw": Row(),
    "optax.noisy_sgd": Row(lambda: optax.noisy_sgd(RATE, key=jax.random.key(1))),
    "optax.novograd": Row(remark=f"{LEAF}, its second moment"),
    "optax.optimistic_adam": Row(
        lambda: optax.optimistic_adam(RATE), remark="deprecated in favour of `optimistic_adam_v2`"
    ),
    "optax.optimistic_adam_v2": Row(),
    "optax.optimistic_gradient_descent": Row(),
    "optax.polyak_sgd": Row(extra=("value",)),
    "optax.radam": Row(),
    "optax.rmsprop": Row(),
    "optax.rprop": Row(),
    "optax.sgd": Row(),
    "optax.sgd(momentum=0.9, nesterov=True)": Row(
        lambda: optax.sgd(RATE, momentum=0.9, nesterov=True)
    ),
    "optax.sign_sgd": Row(),
    "optax.signum": Row(),
    "optax.sm3": Row(),
    "optax.yogi": Row(),
    "optax.contrib.acprop": Row(
        refused="moves a weight that has just grown",
        remark="divides by the last step's second moment, zero for a grown weight",
    ),
    "optax.contrib.ademamix": Row(),
    "optax.contrib.adopt": Row(),
    "optax.contrib.cocob": Row(),
    "optax.contrib.dadapt_adamw": Row(),
    "optax.contrib.dog": Row(),
    "optax.contrib.dowg": Row(),
    "optax.contrib.dpsgd": Row(
        lambda: optax.contrib.dpsgd(RATE, 1.0, 0.1, 0), refused="single examples", remark=EXAMPLES
    ),
    "optax.contrib.differentially_private_aggregate": Row(
        lambda: optax.contrib.differentially_private_aggregate(1.0, 0.1, 0),
        refused="single examples",
        remark=EXAMPLES,
    ),
    "optax.contrib.galore": Row(
        lambda: optax.contrib.galore(RATE, rank=2, update_proj_gap=4),
        limit=True,
        remark="moments live in a projection of the leaf; a projection that is due on a mask step "
        "waits for the next time",
    ),
    "optax.contrib.madgrad": Row(),
    "optax.contrib.mechanize(optax.adamw)": Row(lambda: optax.contrib.mechanize(optax.adamw(RATE))),
    "optax.contrib.momo": Row(extra=("value",)),
    "optax.contrib.momo_adam": Row(extra=("value",)),
    "optax.contrib.muon": Row(
        remark="its orthogonalised update is dense and is masked afterwards",
    ),
    "optax.contrib.prodigy": Row(),
    "optax.contrib.sam(optax.sgd, ...)": Row(sam, limit=True, remark=SAM),
    "optax.contrib.schedule_free(optax.sgd)": Row(
        lambda: optax.contrib.schedule_free(optax.sgd(RATE), RATE)
    ),
    "optax.contrib.schedule_free_adamw": Row(),
    "optax.contrib.schedule_free_sgd": Row(),
    "optax.contrib.simplified_ademamix": Row(),
    "optax.contrib.sophia(update_interval=4)": Row(
        lambda: optax.contrib.sophia(RATE, update_interval=4),
        extra=("obj_fn",),
        limit=True,
        remark="a Hessian that is due on a mask step waits for the next time",
    ),
    # Wrappers and links, each around an optimizer of the kind that it is used with.
    "optax.MultiSteps(optax.adam, 2)": Row(
        lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
        limit=True,
        remark=f"{SAM}; better around `transform`, where the scores see the accumulated mean and "
        "`total_steps` counts optimizer steps",
    ),
    "optax.apply_if_finite(optax.adam)": Row(lambda: optax.apply_if_finite(optax.adam(RATE), 5)),
    "optax.chain(optax.clip_by_global_norm, optax.adamw)": Row(
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
        remark="the norm is that of the active gradient",
    ),
    "optax.chain(optax.sgd, optax.apply_every(2))": Row(
        lambda: optax.chain(optax.sgd(RATE), optax.apply_every(2)), limit=True, remark=SAM
    ),
    "optax.chain(optax.sgd, optax.scale_by_backtracking_linesearch)": Row(
        lambda: optax.chain(optax.sgd(RATE), optax.scale_by_backtracking_linesearch(5)),
        extra=("value", "grad", "value_fn"),
        remark=LINESEARCH,
    ),
    "optax.chain(optax.adam, optax.contrib.reduce_on_plateau)": Row(
        lambda: optax.chain(optax.adam(RATE), optax.contrib.reduce_on_plateau(patience=2)),
        extra=("value",),
        limit=True,
        remark="a reduction that is due on a mask step waits for the next plateau",
    ),
    "optax.chain(optax.ema, optax.sgd)": Row(lambda: optax.chain(optax.ema(0.9), optax.sgd(RATE))),
    "optax.flatten(optax.adam)": Row(lambda: optax.flatten(optax.adam(RATE))),
    "optax.inject_hyperparams(optax.adamw)": Row(
        lambda: optax.inject_hyperparams(optax.adamw)(RATE)
    ),
    "optax.lookahead(optax.sgd, ...)": Row(
        lambda: optax.lookahead(optax.sgd(RATE), 2, 0.5),
        refused="different structures",
        remark="its parameters are pairs, whose slow ones have no gradient",
    ),
    "optax.masked(optax.adam)": Row(lambda: optax.masked(optax.adam(RATE), matrices)),
    "optax.multi_transform, optax.partition": Row(
        lambda: optax.partition(
            {"matrix": optax.adam(RATE), "vector": optax.sgd(RATE, momentum=0.9)}, by_label
        ),
        remark="frozen parts: see below",
    ),
    "optax.contrib.split_real_and_imaginary(optax.adam)": Row(
        lambda: optax.contrib.split_real_and_imaginary(optax.adam(RATE))
    ),
}
# What is no optimizer by itself: links of a chain, wrappers that the table has under another
# name or that are as their parts.
LINKS = {
    "optax": "adaptive_grad_clip add_decayed_weights add_noise apply_every centralize clip "
    "clip_by_block_rms clip_by_global_norm conditionally_mask conditionally_transform ema freeze "
    "identity inject_hyperparams inject_stateful_hyperparams keep_params_nonnegative "
    "measure_with_ema monitor multi_transform named_chain normalize_by_update_norm partition "
    "chain scale selective_transform set_to_zero snapshot stateless stateless_with_tree_map trace "
    "with_extra_args_support zero_nans",
    "optax.contrib": "hutchinson_estimator_diag_hessian normalize reduce_on_plateau "
    "schedule_free_eval_params",
}


def installed(name):
    """Whether this optax has it: the table is that of the newest."""
    first = name.split(",")[0].removeprefix("optax.").split("(")[0].split(".")
    found = optax
    for part in first:
        found = getattr(found, part, None)
    return found is not None


NAMES = [name for name in OPTIMIZERS if installed(name)]
ACCEPTED = [name for name in NAMES if not OPTIMIZERS[name].refused]
LIMITS = [name for name in NAMES if OPTIMIZERS[name].limit]


def make(name):
    row = OPTIMIZERS[name]
    if row.make is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return row.make()
    return functools.reduce(getattr, name.split(".")[1:], optax)(RATE)


def public(module):
    """Names of the functions in it that make gradient transformations, `scale_by_*` aside.

    In optax.contrib, where not all say what they return, of all functions.
    """
    for name, function in inspect.getmembers(module, inspect.isfunction):
        makes = "GradientTransformation" in str(inspect.signature(function).return_annotation)
        if name[0] != "_" and not name.startswith("scale_by_"):
            if makes or module is optax.contrib:
                yield name


@pytest.mark.parametrize("module", [optax, optax.contrib], ids=["optax", "contrib"])
def test_no_optimizer_of_optax_is_missing(module):
    prefix = module.__name__
    known = {name.removeprefix(f"{prefix}.").split("(")[0] for name in OPTIMIZERS}
    missing = set(public(module)) - known - set(LINKS[prefix].split())
    assert not missing, f"optax {optax.__version__}: new in {prefix}, for OPTIMIZERS or LINKS"


def make_params():
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (8, 6)), "bias": jnp.ones(6)},
        "b": {"kernel": jax.random.normal(keys[1], (8, 6))},
        "c": {"kernel": jax.random.normal(keys[2], (6, 5))},
    }


@functools.cache
def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), make_params())


def loss(params):
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))


def extras(names, step, grads):
    known = {"value": 1.0 + 0.1 * (step % 2), "grad": grads, "obj_fn": loss, "value_fn": loss}
    return {name: known[name] for name in names}


def transformed(inner, **options):
    return dstee.transform(
        inner,
        **dict(sparsity=0.5, total_steps=12, key=KEY, every=3, stop=1.0, drop_fraction=0.4)
        | options,
    )


def unmatched(inner, params):
    return dstee.unmatched_state(optax.with_extra_args_support(inner), params)


def init(tx, inner, params):
    """The first state and parameters; warns if and only if the state cannot be matched."""
    warned = pytest.warns(UserWarning, match="mask steps leave them as they are")
    with warned if unmatched(inner, params) else contextlib.nullcontext():
        state = tx.init(params)
    return dstee.apply_masks(params, state), state


def counted(function):
    """The function under jit, and a list with an entry for each time that it was traced."""
    traces = []

    def traced(*args):
        traces.append(1)
        return function(*args)

    return jax.jit(traced), traces


def run(tx, params, state, names):
    """Parameters and state of every step, as NumPy arrays; and how often the step was traced."""

    def one(params, state, grads, step):
        updates, state = tx.update(grads, state, params, **extras(names, step, grads))
        return optax.apply_updates(params, updates), state

    one, traces = counted(one)
    seen = [(params, state)]
    for step in range(1, STEPS + 1):
        seen.append(one(*seen[-1], gradients(step), step))
    return seen, len(traces)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def entries(state, params):
    """Pairs: where in the state, and of which parameter, has it one value for each weight.

    By the ends of paths; of a vector of all parameters in a row, the parameter is None.
    """
    shapes = {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    total = sum(map(np.prod, shapes.values()))
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        if is_float(leaf) and leaf.shape == (total,):
            yield i, path, None
        for end, shape in shapes.items():
            if is_float(leaf) and path[-len(end) :] == end and leaf.shape == shape:
                yield i, path[: -len(end)], end


def everywhere(masks, params):
    """A bool array for each parameter, True where it is dense."""

    def one(mask, leaf):
        return np.ones(leaf.shape, bool) if isinstance(mask, optax.MaskedNode) else np.array(mask)

    return jax.tree.map(one, masks, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def where(masks, tree):
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0), masks, tree)


def make_reference(inner, names):
    """What a step should give, from the state before it and the masks before and after it.

    `hold`: a mask step that moves no weight. Then masks change before the step, else after it.
    """

    def one(params, state, grads, step, old, new, hold):
        stays = jax.tree.map(jnp.logical_and, old, new)
        changed = jax.tree.map(jnp.logical_xor, old, new)
        seen = jax.tree.map(lambda s, o: jnp.where(hold, s, o), stays, old)
        extra = extras(names, step, grads)
        updates, after = inner.update(where(seen, grads), state, params, **extra)
        stepped = optax.apply_updates(params, updates)
        stepped = jax.tree.map(lambda p, s: jnp.where(hold, p, s), params, stepped)
        leaves, treedef = jax.tree.flatten(after)
        for i, before in enumerate(jax.tree.leaves(state)):
            if is_float(before):
                leaves[i] = jnp.where(hold, before, leaves[i])
        fresh = jax.tree.leaves(inner.init(where(stays, params)))
        by_path = dict(jax.tree_util.tree_leaves_with_path(changed))
        flat = jnp.concatenate([c.ravel() for c in by_path.values()])
        for i, _, end in entries(state, params):
            leaves[i] = jnp.where(flat if end is None else by_path[end], fresh[i], leaves[i])
        return where(stays, stepped), treedef.unflatten(leaves)

    return counted(one)


def same(ours, theirs):
    def one(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)

    jax.tree.map(one, ours, theirs)


@pytest.mark.parametrize("name", ACCEPTED)
def test_three_mask_steps(name):
    """With `update_weights` and without: the reference, counts, zeros, one program."""
    params, inner, names = make_params(), make(name), OPTIMIZERS[name].extra
    inner = optax.with_extra_args_support(inner)
    start = init(transformed(inner), inner, params)
    reference, traces = make_reference(inner, names)
    for update_weights in False, True:
        seen, traced = run(transformed(inner, update_weights=update_weights), *start, names)
        for step in range(1, STEPS + 1):
            (params, before), (ours, after) = seen[step - 1 : step + 1]
            old, new = (everywhere(state.masks, params) for state in (before, after))
            hold = step in MASK_STEPS and not update_weights
            given = params, before.inner_state, gradients(step), step, old, new, hold
            theirs, inner_state = reference(*given)
            same(ours, theirs)
            same(after.inner_state, inner_state)
            for layer in params:
                m, n, kernel = (np.asarray(tree[layer]["kernel"]) for tree in (old, new, ours))
                assert m.sum() == n.sum()
                assert (m != n).any() == (step in MASK_STEPS)
                assert np.isfinite(kernel).all()
                assert not kernel[~n].any()
        assert traced == len(traces)  # as often as the optimizer itself, in the reference


@pytest.mark.parametrize("name", ACCEPTED)
def test_ordinary_steps_are_differentiable_where_the_optimizer_is(name):
    params, inner, row = make_params(), make(name), OPTIMIZERS[name]
    inner = optax.with_extra_args_support(inner)
    tx = transformed(inner)
    params, state = init(tx, inner, params)

    def differentiable(update, state, **options):
        def after(grads):
            extra = extras(row.extra, 1, grads) | options
            return loss(optax.apply_updates(params, update(grads, state, params, **extra)[0]))

        try:
            jax.eval_shape(jax.grad(after), params)
        except ValueError as error:
            if "Reverse-mode differentiation does not work" not in str(error):
                raise
            return False
        return True

    of_inner = differentiable(inner.update, state.inner_state)
    assert differentiable(tx.update, state, mask_step=False) == of_inner


def test_statistics_of_any_axis_are_listed():
    """Also those as long as a bias: c's columns are 6, a's bias is too."""
    kernels = [f"{name}/kernel" for name in "abc"]
    names = [f"{field}/{kernel}" for field in ("v_row", "v_col") for kernel in kernels]
    factored = optax.adafactor(RATE, min_dim_size_to_factor=4)
    listed = dstee.unmatched_state(factored, make_params())
    assert ["/".join(name.split("/")[-3:]) for name in listed] == names


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIMIZERS[name].refused])
def test_what_cannot_be_right_is_refused(name):
    params, message = make_params(), OPTIMIZERS[name].refused

    def first_step():
        tx = transformed(make(name))
        if "lookahead" in name:
            pairs = optax.LookaheadParams.init_synced(params)
            return tx.update(params, tx.init(pairs), pairs)
        # An axis of examples, as what takes them needs it.
        return tx.update(jax.tree.map(lambda x: x[None], params), tx.init(params), params)

    with pytest.raises(ValueError, match=message):
        first_step()


def test_gradients_of_single_examples_go_through_a_link_before():
    params = make_params()
    link = make("optax.contrib.dpsgd")
    tx = optax.chain(link, transformed(None))
    state = tx.init(params)
    params = dstee.apply_masks(params, state)
    each = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), gradients(1))
    mean = jax.tree.map(lambda x: x.mean(0), each)
    ours, _ = tx.update(each, state, params, grad=mean)
    theirs, _ = link.update(each, link.init(params), params)
    masks = everywhere(dstee.get_state(state).masks, params)
    same(ours, jax.tree.map(lambda m, u: jnp.where(m, u, 0), masks, theirs))


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_none_with_update_weights(name):
    """On mask steps that exchange nothing it is then the optimizer itself, on fixed masks.

    By default it is not even the optimizer that is not called on mask steps.
    """
    inner, names = optax.with_extra_args_support(make(name)), OPTIMIZERS[name].extra
    start = init(transformed(inner), inner, make_params())
    mask = everywhere(start[1].masks, start[0])
    reference, _ = make_reference(inner, names)

    def plain(steps):
        params, state = start[0], start[1].inner_state
        for step in steps:
            params, state = reference(params, state, gradients(step), step, mask, mask, False)
        return params

    def ours(update_weights):
        tx = transformed(inner, drop_fraction=0.0, update_weights=update_weights)
        return run(tx, *start, names)[0][-1][0]

    steps = range(1, STEPS + 1)
    same(ours(update_weights=True), plain(steps))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        same(ours(update_weights=False), plain(s for s in steps if s not in MASK_STEPS))


def first_updates(name, steps=2000, after=20):
    """How far a grown weight moves, of what the others do: at first, and at most in `after` steps.

    Gradients are steady, each of a sign of its own, with noise of half their size; medians over
    the weights of a leaf. The mask step comes after `steps` steps, when counts are long past
    the bias corrections.
    """
    params = {"kernel": jax.random.normal(KEY, (16, 16))}
    names = OPTIMIZERS[name].extra
    tx = transformed(make(name), every=steps, total_steps=2 * steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = tx.init(params)
    signs = jax.random.rademacher(jax.random.key(1), (16, 16), jnp.float32)

    def one(carry, step):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(KEY, step), (16, 16)) / 2
        grads = {"kernel": signs * (1 + noise)}
        updates, state = tx.update(grads, state, params, **extras(names, step, grads))
        carry = optax.apply_updates(params, updates), state
        return carry, (jnp.abs(updates["kernel"]), state.masks["kernel"])

    start = dstee.apply_masks(params, state), state
    _, seen = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(1, steps + after + 1)))(start)
    moved, masks = map(np.asarray, seen)
    old, new = masks[steps - 2], masks[steps - 1]
    grown = [np.median(x[new & ~old]) for x in moved[steps:]]
    others = np.median(moved[steps:][:, new & old])
    if others == 0:  # it has come to rest, whatever the gradients say
        return np.nan, np.nan
    return float(grown[0] / others), float(max(grown) / others)


FIGURES = ["optax.sgd", "optax.adam", "optax.lion"]  # of which the tests measure anew
COLUMNS = "inner", "supported", "starts again with", "left as it is", "first", "largest", "remark"


def field(parts):
    """The innermost name of a state's field in a path."""
    ours = {"a", "b", "c", "kernel", "bias"}
    return next(p for p in reversed(parts) if not p.isdigit() and p not in ours)


def describe(name):
    """A row of the table without what is measured."""
    row = OPTIMIZERS[name]
    shown = f"`{name}`".replace(", optax.partition", "`, `optax.partition")
    supported = "no" if row.refused else "with `update_weights=True`" if row.limit else "yes"
    again, left = [], []
    if not row.refused:
        params, inner = make_params(), make(name)
        params = where(jax.tree.map(lambda x: np.zeros(x.shape, bool), params), params)
        state = inner.init(params)
        leaves = jax.tree.leaves(state)
        for i, path, end in entries(state, params):
            if end is None or ("a" in str(end[0]) and "kernel" in str(end[-1])):
                (value,) = set(np.asarray(leaves[i]).ravel().tolist())
                parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
                again.append(f"{field(parts)} {value:.3g}")
        left = [field(path.split("/")) for path in unmatched(inner, params)]
    listed = [", ".join(dict.fromkeys(column)) or "–" for column in (again, left)]
    return [shown, supported, *listed, row.remark]


def table():
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for name in NAMES:
        *cells, remark = describe(name)
        figures = first_updates(name) if describe(name)[1] == "yes" else (np.nan, np.nan)
        written = [f"{x:.1f}" if np.isfinite(x) and x < 1e4 else "–" for x in figures]
        lines.append("| " + " | ".join([*cells, *written, remark]) + " |")
    return "\n".join(lines)


def on_the_page():
    text = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_the_page_has_the_table():
    rows = [row for row in on_the_page() if installed(row[0].replace("`", ""))]
    assert [[*row[:4], row[6]] for row in rows] == [describe(name) for name in NAMES], (
        "renew the table: python -m tests.test_optimizers"
    )


@pytest.mark.parametrize("name", FIGURES)
def test_first_updates_of_a_grown_weight(name):
    (row,) = [row for row in on_the_page() if row[0] == f"`{name}`"]
    np.testing.assert_allclose(first_updates(name), [float(x) for x in row[4:6]], rtol=0.15)


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text("\n\n".join([f"{before}{MARKS[0]}", table(), f"{MARKS[1]}{after}"]))
