"""Arguments of a wrong kind: each is an error that names the argument and the value, at once."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from dstee_jax import at_init, memory, methods, penalties, plans, scales, scores, structures

KEY = jax.random.key(0)
# What the arguments without a default are.
NEEDED = {"key": KEY, "total_steps": 20_000, "sparsity": 0.9, "n": 2, "m": 4, "end": 0.5}
NEEDED |= {"initial_sparsity": 0.5, "partitions": 4, "rho": 0.01, "start": 0, "stop": 1}
NEEDED |= {"importance": scores.momentum(), "score": scores.gradient(), "every": 100}
INNER = optax.adam(1e-3)
FACTORIES = {"transform": dstee.transform}
for module in (memory, methods, penalties, plans, scales, scores, structures):
    short = module.__name__.split(".")[-1]
    for name, one in vars(module).items():
        mine = getattr(one, "__module__", "").startswith("dstee_jax.")
        if mine and inspect.isfunction(one) and not name.startswith(("_", "check_")):
            FACTORIES[f"{short}.{name}"] = one
INSIDE = {"apportion", "portion", "first_rule_state", "recall", "remember", "largest"}
INSIDE |= {"largest_of_all", "largest_bits", "sharding_of", "at_least_float32", "is_number"}
# A step or an interval that methods compute.
COMPUTED = {"memory.admm", "penalties.admm"}


def call(factory, **wrong):
    """The factory with what it needs and a wrong argument."""
    takes = inspect.signature(factory).parameters
    first = [INNER] if "inner" in takes else []
    given = {
        name: NEEDED[name] for name, p in takes.items() if p.default is p.empty and name in NEEDED
    }
    if "options" in takes or factory is dstee.transform:
        given |= {"key": KEY, "total_steps": 20_000, "sparsity": 0.9}
    return factory(*first, **(given | wrong))


def numbers():
    """(factory, argument) of all arguments that are numbers by their annotation."""
    for name, factory in FACTORIES.items():
        if name.split(".")[-1] in INSIDE or name in COMPUTED:
            continue
        for argument, p in inspect.signature(factory).parameters.items():
            if p.annotation in (float, int, "float", "int", float | None):
                yield pytest.param(name, argument, id=f"{name}-{argument}")


def test_there_are_numbers_of_all_kinds():
    found = {one.id for one in numbers()}
    assert len(found) > 50
    assert found >= {
        "transform-total_steps", "methods.srigl-gamma", "methods.smet-warm_up", "methods.gse-share",
        "methods.set-zeta", "methods.mest-mutation", "methods.chts-last_power",
        "scales.warm_up-steps", "scales.own_bias_correction-b1", "scales.density-power",
        "scores.subset-share",
        "scores.two_sided-fraction", "structures.ablation-gamma", "structures.n_m-m",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), list(numbers()))
def test_a_number_of_another_kind_is_named(name, argument):
    for wrong in ("0.3", math.nan, [0.3]):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call(FACTORIES[name], **{argument: wrong})
        assert repr(wrong).strip("'") in str(error.value), error.value


SCORE = "must be a function of one leaf, as dstee"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grow": "gradient"}, f"grow='gradient' {SCORE}"),
        ({"grow": scores.gradient}, f"grow=<function gradient.* {SCORE}"),
        ({"drop": scores.acquisition}, f"drop=<function acquisition.* {SCORE}"),
        ({"scale": scales.warm_up}, f"scale=<function warm_up.* {SCORE}"),
        ({"penalty": 3}, f"penalty=3 {SCORE}"),
        ({"grow": lambda leaf, key: leaf.grad}, f"grow=<function .* {SCORE}"),
        ({"plan": plans.exchange}, r"plan=<function exchange.* pass dstee.plans.exchange\(\)"),
        ({"memory": "momentum"}, "memory='momentum' is no Memory: pass dstee.memory"),
        ({"structure": structures.constant_fan_in}, "structure=<function .* is no Structure: pass"),
        ({"where": "kernel"}, "where='kernel' must be a function of a path and a leaf"),
        ({"distribution": "erk"}, "distribution='erk' must be a function of shapes"),
        ({"regrow": "no"}, "regrow='no' must be True or False"),
        ({"packed": 1}, "packed=1 must be True or False"),
        ({"indices": None}, "indices=None must be True or False"),
        ({"update_weights": "yes"}, "update_weights='yes' must be True or False"),
        ({"counter_dtype": "x"}, "counter_dtype='x' must be unsigned"),
        ({"every": "10"}, "every='10' must be an integer"),
        ({"total_steps": 1.5}, "total_steps=1.5 must be a whole number"),
        ({"sparsity": "0.9"}, r"sparsity is '0.9': it must be in \[0, 1\)"),
        ({"sparsity": {"kernel": "0.9"}}, r"sparsity of kernel is '0.9'"),
        ({"drop_fraction": "0.3"}, "drop_fraction='0.3' must be a finite number"),
    ],
)  # fmt: skip
def test_parts_of_another_kind_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        call(dstee.transform, **options)


@pytest.mark.parametrize("name", ["key", "every", "sparsity", "total_steps", "stop", "start"])
def test_a_value_that_would_fill_the_screen_is_cut_short(name):
    params = [{"kernel": jnp.zeros((8, 8))}] * 30
    with pytest.raises(ValueError, match=r"\.\.\. \(a list\)") as error:
        call(dstee.transform, **{name: params})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call(methods.set, zeta=0), r"zeta=0 must be a share of the weights in \(0, 1\]"),
        (lambda: call(methods.set, zeta=0.3, drop_fraction=0.5), "zeta= stands for drop_fraction="),
        (lambda: call(methods.mest, mutation=0.1, drop_fraction=0.5), "mutation= stands for "),
        (lambda: call(methods.cht, chain="a"), "chain='a' must be names of leaves"),
        (lambda: call(methods.smet, betas=(0.9,)), r"betas=\(0.9,\) must be \(b1, b2\)"),
        (lambda: call(methods.srigl, exempt="head"), "exempt='head' must be a function of a "),
        (lambda: call(methods.srigl, of_dense="yes"), "of_dense='yes' must be True or False"),
        (lambda: scores.magnitude_and_gradient(-1), "weight=-1 must be 0 or more"),
        (lambda: scores.sampled(scores.magnitude(), -1), "power=-1 must be 0 or more"),
        (lambda: scores.subset("gradient"), "score='gradient' must be a function of one leaf"),
        (lambda: scores.normalized(scores.saliency), "score=<function saliency.* as scores.sali"),
        (scales.product, "a product of no scales"),
        (lambda: scales.product(scales.warm_up), "scale=<function warm_up"),
        (lambda: structures.tiles(32), r"tiles=32 must be two sizes of 1 or more"),
    ],
)  # fmt: skip
def test_of_the_parts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adams_correction_needs_adam():
    for inner in (optax.sgd(0.1), optax.rmsprop(0.1), optax.chain(optax.sgd(0.1, momentum=0.9))):
        with pytest.raises(ValueError, match=r"betas=.* pass betas=None"):
            methods.smet(
                inner, **{name: NEEDED[name] for name in ("key", "sparsity", "total_steps")}
            )
    for inner in (optax.adamw(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1)), None):
        call(functools.partial(methods.smet, inner))
    labels = {"a": "one", "b": "two"}  # takes no tree but its own: not tried
    call(functools.partial(methods.smet, optax.partition({"one": INNER, "two": INNER}, labels)))


def test_a_scale_that_overflows():
    w = jnp.ones((20, 10))
    leaf = dstee.Leaf(w, w, w > 0, w, KEY, 1, target=20)
    assert float(scales.density(0.5)(leaf)[0, 0]) == pytest.approx(10**0.5)
    with pytest.raises(ValueError, match=r"power=100 multiplies .* density 0.1 by inf: lower it"):
        scales.density(100)(leaf)


X = np.random.default_rng(0).normal(size=(20, 8))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "batch=None of CSTI must be an array of inputs"),
        (X[0], "of CSTI must be an array of inputs"),
        (X[:0], "of CSTI must be an array of inputs"),
        (X[:1], "the 1 inputs of the batch have no finite correlations"),
        (np.ones_like(X), "the 20 inputs of the batch have no finite correlations"),
        (X * math.nan, "the 20 inputs of the batch have no finite correlations"),
    ],
)
def test_csti_needs_inputs_that_differ(batch, message):
    with pytest.raises(ValueError, match=message):
        at_init.csti(None, {"kernel": jnp.ones((8, 8))}, batch, 0.5, KEY)


def test_numbers_of_arrays_are_numbers():
    """What JAX and NumPy give: a scalar array says the same as a Python number."""
    params = {"kernel": jnp.ones((20, 10))}
    for sparsity in (jnp.float32(0.75), np.float64(0.75), {"kernel": jnp.float32(0.75)}):
        tx = call(dstee.transform, sparsity=sparsity, drop_fraction=jnp.float32(0.5))
        state = tx.init(params)
        assert int(state.masks["kernel"].sum()) == 50
        jax.jit(tx.update).lower(params, state, params)
