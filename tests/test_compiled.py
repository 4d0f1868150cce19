"""Programs compiled for a TPU and an H100, without one: what they read, copy, send and alias."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from benchmarks import compiled, programs, targets
from benchmarks.networks import shapes_of
from experiments.training import records

pytestmark = pytest.mark.optimized
TPU, GPU = "tpu:v5e:2x2", "gpu:h100"
EIGHT = {TPU: "tpu:v5e:2x4", GPU: "gpu:h100x8"}
SHAPES = [(3, 3, 64, 256), (512, 1024), (1024, 256)]
LEAF = 3 * 3 * 64 * 256 * 2  # bytes of the smallest one, in bfloat16
TILE = (64, 128)


def needs(target):
    return pytest.param(
        target,
        marks=pytest.mark.skipif(
            not targets.is_installed(target[:3]), reason="needs pip install -e '.[compile]'"
        ),
    )


BOTH = pytest.mark.parametrize("target", [needs(TPU), needs(GPU)])


def optimizer(target, form=None, mask_step=False, inner=None, dtype=jnp.float32):
    """Figures of an optimizer's step on small parameters, and the program."""
    return _optimizer(target, form, mask_step, inner, dtype)


@functools.cache
def _optimizer(target, form, mask_step, inner, dtype):
    options = {"inner": inner, "dtype": dtype}
    program = programs.optimizer(SHAPES, form, mask_step, target=target, tile=TILE, **options)
    done, _ = compiled.compiled(program)
    return compiled.figures(done, LEAF), done


@BOTH
@pytest.mark.parametrize("form", ["plain", "tiles"])
def test_an_ordinary_step_only_updates(target, form):
    found, _ = optimizer(target, form)
    for what in ("collectives", "loops", "conditionals", "copies", "gathers"):
        assert found[what] == 0, what


@BOTH
@pytest.mark.parametrize("form", ["plain", "tiles"])
@pytest.mark.parametrize("mask_step", [False, True])
def test_what_is_donated_is_aliased(target, form, mask_step):
    found, done = optimizer(target, form, mask_step)
    small = 4096 * len(jax.tree.leaves(done.out_info))  # a scalar takes a line of a TPU's memory
    assert found["aliased"] >= found["outputs"] - small > 0


@pytest.mark.parametrize("target", [needs(TPU)])
@pytest.mark.parametrize(
    ("inner", "dtype", "most"),
    [(optax.adamw(1e-3), jnp.float32, 1.1), (optax.sgd(0.1), jnp.bfloat16, 1.2)],
)
def test_an_ordinary_step_reads_what_the_dense_optimizer_reads(target, inner, dtype, most):
    dense, _ = optimizer(target, inner=inner, dtype=dtype)
    sparse, _ = optimizer(target, "plain", inner=inner, dtype=dtype)
    assert sparse["accessed"] <= most * dense["accessed"]


@BOTH
def test_a_step_of_tiles_takes_their_share(target):
    dense, _ = optimizer(target)
    tiles, _ = optimizer(target, "tiles")
    assert tiles["arguments"] < 0.5 * dense["arguments"]


@pytest.mark.parametrize("target", [needs(GPU)])
def test_packed_weights_on_a_gpu(target):
    found, _ = optimizer(target, "packed")
    assert found["loops"] == found["conditionals"] == found["copies"] == 0
    assert found["arguments"] < optimizer(target)[0]["arguments"]


def sharded(target, mask_step):
    """Figures of a step whose parameters are split over eight devices."""
    mesh = targets.mesh_of(EIGHT[target])
    params = shapes_of(
        SHAPES, lambda shape: NamedSharding(mesh, P(*[None] * (len(shape) - 1), "data"))
    )
    tx = programs.transformed(optax.adamw(1e-3), selection="sharded")
    bare = jax.eval_shape(tx.init, params)
    state = programs.placed(bare, dstee.state_shardings(bare, params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    done, _ = compiled.compiled(programs.Program(step, (params, state, params)))
    return compiled.figures(done, LEAF)


@BOTH
def test_a_sharded_step_sends_counts_alone(target):
    assert sharded(target, False)["collectives"] == 0
    found = sharded(target, True)
    assert set(found["kinds"]) == {"all-reduce"}
    assert found["in_a_row"] <= 70
    assert found["sent"] < 64_000


@BOTH
def test_a_data_parallel_step_sends_active_gradients_alone(target):
    mesh = targets.mesh_of(EIGHT[target])
    whole = NamedSharding(mesh, P())
    params = shapes_of(SHAPES, lambda shape: whole)
    tx = programs.transformed(
        optax.adamw(1e-3), structure=dstee.structures.tiles(TILE), packed=True
    )
    state = jax.eval_shape(tx.init, params)
    rectangles = jax.eval_shape(lambda p, s: dstee.to_tiles(p, dstee.tiles(s, p)), params, state)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def mean(grads, state):
        return dstee.pmean(grads, state, "data", dense=False)

    args = programs.placed((rectangles, state), whole)
    found = compiled.figures(compiled.compiled(programs.Program(mean, args))[0])
    size = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(rectangles))
    assert found["kinds"] == ["all-reduce"]
    assert found["sent"] <= 1.05 * size


@BOTH
def test_a_product_of_tiles_has_no_scatter_and_no_loop(target):
    done, _ = compiled.compiled(programs.product(256, target=target))
    text = done.as_text()
    assert " scatter(" not in text
    assert compiled.figures(done)["loops"] == 0


@BOTH
def test_nothing_is_compiled_twice(target):
    compilations = []

    def listen(event, seconds, **_):
        compilations.extend([event] * event.endswith("backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        program = programs.optimizer(SHAPES, "plain", target=target)
        compiled.compiled(program)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compilations) == 1


@pytest.mark.parametrize("target", ["tpu", "tpu:v5e", "gpu:a100", "v5e:4x4", "gpu:h100x"])
def test_a_target_that_is_none(target):
    with pytest.raises(ValueError, match="is unknown: pass one as tpu:v5e:4x4"):
        targets.devices_of(target)


@pytest.mark.parametrize("target", [needs("tpu:v5e:3x5"), needs("tpu:v99:2x2")])
def test_a_slice_that_is_none(target):
    with pytest.raises(ValueError, match=f"{target}' is no TPU slice: "):
        targets.devices_of(target)


def test_a_compiler_that_is_missing(monkeypatch):
    monkeypatch.setattr(targets, "is_installed", lambda platform: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[compile\]'"):
        targets.devices_of(TPU)


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compiled.parse(["--programs", "optimiser.*"])
    assert "names none of: optimizer.layer" in capsys.readouterr().err
    compiled.main(["--list"])
    assert "training.billion.mask_step" in capsys.readouterr().out


def test_the_tables_of_the_docs_are_those_of_the_records():
    page = (records.RESULTS.parent / "docs" / "accelerators.md").read_text()
    assert compiled.table(records.read(records.RESULTS / "compiled.jsonl"), compiled.SHORT) in page
