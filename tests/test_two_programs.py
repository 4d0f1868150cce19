"""Two programs, of ordinary and of mask steps, train as one that holds both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dstee_jax as dstee
from experiments.training.methods import METHODS, mask_steps, optimizer, segments

STEPS = 60
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 12)).astype(np.float32), RNG.normal(size=(64, 6)).astype(np.float32)
KEY = jax.random.key(0)
INNER = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9, nesterov=True))


def first_params():
    shapes = {"first": (12, 16), "second": (16, 16), "third": (16, 6)}
    normal = jax.random.normal
    return {
        name: {"kernel": normal(jax.random.fold_in(KEY, i), s) / 4, "bias": jnp.zeros(s[1])}
        for i, (name, s) in enumerate(shapes.items())
    }


def loss(params, x, y):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean((x @ params["third"]["kernel"] + params["third"]["bias"] - y) ** 2)


def train(tx, due):
    """Parameters at the end, and masks after each step; `due(step)` chooses the program."""
    params = first_params()
    state = tx.init(params)
    sparse = bool(dstee.get_states(state))
    params = dstee.apply_masks(params, state) if sparse else params

    @functools.partial(jax.jit, static_argnames="mask_step")
    def step(params, state, x, y, mask_step):
        grads = jax.grad(loss)(params, x, y)
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    masks = []
    for number in range(1, STEPS + 1):
        rows = slice(8 * (number % 8), 8 * (number % 8 + 1))
        params, state = step(params, state, X[rows], Y[rows], mask_step=due(number))
        if sparse:
            masks.append([np.asarray(m) for m in jax.tree.leaves(dstee.get_state(state).masks)])
    return params, masks


def check_same(tx, due):
    """The number of steps on which masks changed, after a check that both ways agree."""
    params, masks = train(tx, lambda number: True)
    params_2, masks_2 = train(tx, due)
    changes = 0
    for number, (one, two) in enumerate(zip(masks, masks_2, strict=True)):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"step {number + 1}")
        before = masks[number - 1] if number else one
        changes += any((a != b).any() for a, b in zip(before, one, strict=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), params, params_2)
    return changes


FIXED = ("dense", "static", "magnitude", "snip", "grasp", "synflow", "csti", "str", "sis")
FIXED += ("magnitude_ste", "random_ste", "top_kast")
# Of methods whose own schedule has no round in so few steps.
SCHEDULED = (
    "set",
    "set_itop",
    "rigl",
    "rigl_itop",
    "dst_ee",
    "mest",
    "mest_ems",
    "snfs",
    "gmp",
    "gmp_overall",
    "powerpropagation",
    "srigl",
    "smet",
    "gse",
    "set_published",
    "mest_published",
)
OPTIONS = {method: {"every": 10} for method in (*SCHEDULED, "granet", "ac_dc")}
OPTIONS |= {method: {"every": 20} for method in ("cht", "chts")}  # two mask steps a round
OPTIONS["dsr"] = {"every": lambda step: 5 + step // 4}


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_those_of_one_program(method):
    options = {"sparsity": 0.8, "total_steps": STEPS, "key": KEY} | OPTIONS.get(method, {})
    tx = optimizer(method, INNER, **options)
    due = mask_steps(method, tx)
    changes = check_same(tx, lambda number: number in due)
    assert (changes > 0) == (method not in FIXED)
    assert (len(due) > 0) == (method not in FIXED)
    if method == "deep_r":
        assert list(due) == list(range(1, STEPS + 1))
    else:
        assert len(due) < STEPS / 5


def test_gradients_of_several_batches_are_added_up():
    options = {"sparsity": 0.8, "total_steps": STEPS, "key": KEY, "every": 10, "grow_batches": 4}
    tx = dstee.methods.rigl(INNER, **options)
    due = dstee.mask_steps_of(tx)
    assert check_same(tx, lambda number: number in due) == 4
    assert list(due) == [10, 20, 30, 40]


def test_around_multi_steps():
    tx = dstee.methods.rigl(INNER, sparsity=0.8, total_steps=STEPS // 2, key=KEY, every=5)
    due = dstee.mask_steps_of(tx)  # of optimizer steps, each of two batches
    around = optax.MultiSteps(tx, 2).gradient_transformation()
    assert check_same(around, lambda number: number / 2 in due) == 4


def test_a_list_that_misses_a_mask_step_is_found_out():
    tx = dstee.methods.rigl(INNER, sparsity=0.8, total_steps=STEPS, key=KEY, every=10)
    with pytest.raises(AssertionError, match="step 20"):
        check_same(tx, lambda number: number in (10, 30, 40))


def test_mask_steps_of():
    options = {"sparsity": 0.8, "total_steps": 1000, "key": KEY}
    of = dstee.mask_steps_of
    assert of(dstee.transform(**options)) == dstee.mask_steps(1000)
    given = {"every": 70, "start": 0.2, "stop": 0.5}
    assert of(dstee.transform(**options, **given)) == dstee.mask_steps(1000, **given)
    assert list(of(dstee.methods.dsr(**options))) == [100, 200, 300, 500, 900]
    assert of(dstee.methods.static(**options)) == ()
    for tx in (optax.sgd(0.1), optax.chain(dstee.transform(**options))):
        with pytest.raises(ValueError, match="pass the transform that the chain"):
            of(tx)
    with pytest.raises(ValueError, match=r"^mask_steps takes total_steps, .*; mask_steps_of\(tx\)"):
        dstee.mask_steps(dstee.transform(**options))


def test_segments():
    assert segments(0, 5, ()) == [(0, 5, False)]
    assert segments(0, 5, range(1, 100)) == [(0, 5, True)]
    assert segments(0, 7, (3, 4, 7)) == [(0, 2, False), (2, 4, True), (4, 6, False), (6, 7, True)]
    assert segments(6, 3, (7,)) == [(0, 1, True), (1, 3, False)]
    assert segments(7, 2, (7,)) == [(0, 2, False)]
