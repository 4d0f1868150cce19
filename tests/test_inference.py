"""`inference`: every form computes what the dense kernel does, and the fastest one is taken."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dstee_jax as dstee
from dstee_jax.inference import choose, timing

KINDS = ["csr", "csc", "threads", "tiles"]


def sparse(shape, sparsity, tile=(1, 1), seed=0):
    """A masked kernel, and its mask of weights or of tiles."""
    rng = np.random.default_rng(seed)
    mask = rng.random((shape[0] // tile[0], shape[1] // tile[1])) >= sparsity
    kernel = rng.standard_normal(shape).astype(np.float32)
    return kernel * np.repeat(np.repeat(mask, tile[0], 0), tile[1], 1), mask


def timer(monkeypatch, kind):
    """Let the form of that kind seem the fastest; what was timed is added to the list."""
    timed = []

    def medians(runs, repeats):
        timed.append([run() for run in runs])
        at = KINDS.index(kind) + 1 if kind in KINDS else 0
        return [1.0 if i == at else 2.0 for i in range(len(runs))]

    monkeypatch.setattr(choose, "medians", medians)
    return timed


@pytest.mark.parametrize("tile", [(1, 1), (1, 4), (4, 1), (4, 2)])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("shape", [(16, 8), (4, 40), (4, 4)])
def test_every_form_is_the_dense_product(shape, sparsity, tile):
    kernel, mask = sparse(shape, sparsity, tile)
    forms = choose.candidates(kernel, mask, 3)
    assert [form.kind for form in forms[1:]] == KINDS[: 3 + (tile != (1, 1))]
    rng = np.random.default_rng(1)
    for form in forms[1:]:
        for batch in [(), (1,), (5,), (2, 3), (1, 1), (0,)]:
            x = rng.standard_normal((*batch, shape[0])).astype(np.float32)
            y = x @ form
            assert type(y) is np.ndarray
            assert (y.dtype, y.shape) == (np.float32, (*batch, shape[1]))
            expected = x.astype(np.float64) @ kernel.astype(np.float64)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(jnp.asarray(x) @ form, y)
            transposed = np.asfortranarray(x)  # as SciPy's forms leave the layer before
            np.testing.assert_allclose(transposed @ form, expected, rtol=1e-5, atol=1e-5)


def test_the_tiles_are_those_that_are_active():
    kernel, mask = sparse((64, 32), 0.9, (8, 8))
    mask[:, 0] = [True, True, True, False, False, False, False, False]
    kernel[24:, :8] = 0
    mask[:, 1:] = False
    kernel[:, 8:] = 0
    form = choose.candidates(kernel, mask, 1)[-1]
    *_, matrices = form.product.args
    assert matrices.shape == (4, 24, 8)  # of the fullest column; the others are filled up
    assert np.count_nonzero(matrices) == np.count_nonzero(kernel)


def test_more_threads_than_outputs_share_them():
    kernel, mask = sparse((64, 3), 0.5)
    *_, form = choose.candidates(kernel, mask, 8)
    assert form.kind == "threads"
    np.testing.assert_allclose(np.ones(64) @ form, kernel.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [np.arange(4), [0, 1, 2, 3], np.arange(4.0), np.arange(4) > 0])
def test_x_of_other_types_is_converted(x):
    kernel, mask = sparse((4, 6), 0.5)
    for form in choose.candidates(kernel, mask, 2)[1:]:
        assert (x @ form).dtype == np.float32
        np.testing.assert_allclose(x @ form, np.asarray(x, float) @ kernel, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_the_fastest_is_taken(kind, monkeypatch):
    timed = timer(monkeypatch, kind)
    kernel, mask = sparse((16, 8), 0.5, (4, 2))
    params = {"kernel": jnp.asarray(kernel + (kernel == 0))}
    fast = dstee.inference(params, {"kernel": mask}, batch=5, threads=3)["kernel"]
    if kind == "dense":
        assert type(fast) is np.ndarray
        np.testing.assert_array_equal(fast, kernel)
    else:
        assert fast.kind == kind
        assert repr(fast) == f"Form({kind}, 16 x 8, float32)"
    ((dense, *others),) = timed  # all of them were asked for the same
    assert dense.shape == (5, 8)
    for y in others:
        np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", KINDS)
def test_one_form_alone_is_not_timed(form, monkeypatch):
    timed = timer(monkeypatch, form)
    kernel, mask = sparse((16, 8), 0.5, (4, 2))
    for threads in (1, 2):
        taken = dstee.inference({"a": kernel}, {"a": mask}, forms=[form], threads=threads)["a"]
        possible = threads > 1 or form != "threads"
        assert getattr(taken, "kind", "dense") == (form if possible else "dense")
    full = np.repeat(np.repeat(mask, 4, 0), 2, 1)
    taken = dstee.inference({"a": kernel}, {"a": full}, forms=[form], threads=2)["a"]
    assert getattr(taken, "kind", "dense") == ("dense" if form == "tiles" else form)
    assert not timed


def test_forms_are_timed_in_turn(monkeypatch):
    called, now = [], iter(range(10**6))
    monkeypatch.setattr(
        timing,
        "time",
        SimpleNamespace(sleep=lambda _: called.append("pause"), perf_counter=lambda: clock[0]),
    )
    clock = [0.0]

    def run(name, seconds):
        called.append(name)
        clock[0] += seconds * (1000 if next(now) % 5 == 1 else 1)  # some calls take far longer

    runs = [lambda: run("a", 0.002), lambda: run("b", 0.001)]
    assert timing.medians(runs, 2) == pytest.approx([2.0, 1.0])
    assert called == ["pause", *"aaaa", "pause", *"bbbb"] * 2  # the first is not timed


def test_it_measures_here():
    kernel, mask = sparse((512, 512), 0.99)
    fast = dstee.inference({"kernel": kernel}, {"kernel": mask}, threads=1, repeats=3)["kernel"]
    assert type(fast) is np.ndarray or fast.kind in KINDS
    x = np.ones(512, np.float32)
    np.testing.assert_allclose(x @ fast, x @ kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", [None, (4, 8)])
def test_a_network_trained_with_a_state(tile, monkeypatch):
    timer(monkeypatch, "csr" if tile is None else "tiles")
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    params = {
        "up": {"kernel": normal(0, 16, 32), "bias": normal(1, 32)},
        "down": {"kernel": normal(2, 32, 8), "bias": normal(3, 8)},
    }
    structure = {} if tile is None else {"structure": dstee.structures.tiles(tile)}
    tx = optax.chain(
        optax.clip(1.0),
        dstee.transform(
            optax.sgd(0.1), sparsity=0.5, total_steps=1000, key=jax.random.key(4), **structure
        ),
    )
    state = tx.init(params)

    def network(params, x, relu):
        h = relu(x @ params["up"]["kernel"] + params["up"]["bias"])
        return h @ params["down"]["kernel"] + params["down"]["bias"]

    x = normal(5, 3, 16)
    expected = network(dstee.apply_masks(params, state), x, jax.nn.relu)
    for masks in (state, dstee.get_state(state).masks):
        fast = dstee.inference(params, masks, batch=3, threads=3)
        assert fast["up"]["kernel"].kind == ("csr" if tile is None else "tiles")
        assert type(fast["up"]["bias"]) is np.ndarray
        y = network(fast, np.asarray(x), lambda x: np.maximum(x, 0))
        assert type(y) is np.ndarray
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_sparse_matrix_is_an_array(monkeypatch):
    timer(monkeypatch, "csc")
    shapes = {"conv": (3, 3, 4, 8), "stack": (2, 4, 8), "head": (8, 4), "flat": (8, 4)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params |= {"none": jnp.ones((0, 4)), "whole": jnp.ones((4, 4), jnp.int32)}
    masks = {name: jnp.zeros(x.shape, bool) for name, x in params.items()}
    masks |= {"head": optax.MaskedNode()}
    fast = dstee.inference(params, masks)
    assert fast.pop("flat").kind == "csc"
    assert {type(x) for x in fast.values()} == {np.ndarray}
    assert {name: x.shape for name, x in fast.items()} == {
        name: x.shape for name, x in params.items() if name != "flat"
    }
    assert fast.pop("head").all()
    assert not any(x.any() for x in fast.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_widened(dtype, monkeypatch):
    timer(monkeypatch, "csr")
    params = {"kernel": jnp.full((4, 4), 1.5, dtype), "bias": jnp.ones(4, dtype)}
    masks = {"kernel": jnp.eye(4, dtype=bool), "bias": optax.MaskedNode()}
    fast = dstee.inference(params, masks)
    assert fast["kernel"].dtype == fast["bias"].dtype == np.float32
    y = jnp.ones(4, dtype) @ fast["kernel"] + fast["bias"]
    assert y.dtype == np.float32
    assert y.tolist() == [2.5] * 4


def test_without_masks_what_is_zero_is_inactive(monkeypatch):
    timed = timer(monkeypatch, "csr")
    zero = np.eye(4, dtype=np.float32)
    params = {
        "layer": {"kernel": zero, "bias": np.zeros(4)},
        "full": {"kernel": np.ones((4, 4))},
        "embedding": zero,
    }
    fast = dstee.inference(params)
    assert fast["layer"]["kernel"].kind == "csr"
    assert len(timed) == 1
    assert type(fast["full"]["kernel"]) is type(fast["embedding"]) is np.ndarray


def test_nnx_by_its_pure_dict(monkeypatch):
    timer(monkeypatch, "csr")
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.75, total_steps=1000, key=jax.random.key(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    fast = dstee.inference(params, optimizer.opt_state)
    assert fast["kernel"].product.args[0].nnz == 32


def test_several_states_have_each_their_leaves(monkeypatch):
    timer(monkeypatch, "csr")
    params = {"up": jnp.ones((8, 8)), "down": jnp.ones((8, 8))}
    one = lambda s: dstee.transform(  # noqa: E731
        optax.sgd(0.1), sparsity=s, total_steps=1000, key=jax.random.key(0)
    )
    tx = optax.multi_transform({"a": one(0.5), "b": one(0.75)}, {"up": "a", "down": "b"})
    fast = dstee.inference(params, tx.init(params))
    assert [fast[name].product.args[0].nnz for name in ("up", "down")] == [32, 16]


def test_forms_can_be_pickled():
    kernel, mask = sparse((8, 8), 0.5, (2, 2))
    for form in choose.candidates(kernel, mask, 2)[1:]:
        np.testing.assert_array_equal(
            np.ones(8) @ pickle.loads(pickle.dumps(form)), np.ones(8) @ form
        )


FORKED = """
import os, warnings
import numpy as np
from dstee_jax.inference.forms import in_threads
warnings.simplefilter("ignore")  # JAX warns of any fork
form = in_threads(np.eye(8, dtype=np.float32), 2)
assert (np.ones(8) @ form).sum() == 8
child = os.fork()
if not child:
    os._exit(int((np.ones(8) @ form).sum()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_threads_after_a_fork():
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "8", done.stderr


def test_errors_of_x_name_both_shapes():
    kernel, mask = sparse((8, 4), 0.5, (2, 2))
    for form in choose.candidates(kernel, mask, 2)[1:]:
        for x in (np.ones(4), np.ones((8, 3)), jnp.ones((2, 4))):
            message = rf"x of shape \({x.shape[0]},.*and a kernel of shape \(8, 4\) do not fit"
            with pytest.raises(ValueError, match=message):
                x @ form
        with pytest.raises(ValueError, match=r"x of shape \(\) and a kernel"):
            form.__rmatmul__(1.0)
        with pytest.raises(ValueError, match=r"is traced, and Form\(.*: call the network outside"):
            jax.jit(lambda x, form=form: x @ form)(jnp.ones(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0 must be 1 or more"),
        ({"threads": 0}, "threads=0 must be 1 or more"),
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"forms": ["csr", "bsr"]}, r"forms=\['csr', 'bsr'\] must be some of \('dense', 'csr',"),
        ({"forms": "csr"}, "forms='csr' must be some of"),
        ({"masks": {"kernel": np.ones((3, 4), bool)}}, r"kernel has shape \(3, 4\), its parameter"),
        ({"masks": {"kernel": np.ones((8, 4))}}, "kernel has dtype float64: make it bool"),
        ({"masks": {"other": np.ones((8, 4), bool)}}, "masks have nothing for kernel"),
    ],
)
def test_bad_input(options, message):
    masks = options.pop("masks", {"kernel": np.ones((8, 4), bool)})
    with pytest.raises(ValueError, match=message):
        dstee.inference({"kernel": np.ones((8, 4), np.float32)}, masks, **options)


@pytest.mark.parametrize("tile", [(32, 32), (1, 32), (4, 8), (16, 128), (1, 1), (2, 4)])
def test_tiles_are_found_in_a_mask_of_weights(tile):
    """As `load` gives it; tiles of fewer than 8 outputs are taken for single weights."""
    rng = np.random.default_rng(0)
    of_tiles = rng.random((256 // tile[0], 256 // tile[1])) < 0.3
    found = choose.of_tiles(np.kron(of_tiles, np.ones(tile, bool)))
    assert found.shape == ((256, 256) if tile[1] < 8 else of_tiles.shape)
    if tile[1] >= 8:
        np.testing.assert_array_equal(found, of_tiles)
