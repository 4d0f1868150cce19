"""Bytes on the wire and in the state, from compiled programs: sharded, all-reduce, packed.

    python -m benchmarks.bytes_sent

Compiles for 8 forced CPU devices; nothing is run, so the numbers are exact and the same on any
machine. About 2 minutes on 2 CPU cores.
"""

import math
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from benchmarks.collectives import Collective, collectives
from benchmarks.networks import resnet50_shapes, shapes_of, vgg19_shapes

EVERY, SPARSITY = 100, 0.95


def optimizer(inner=None, **options) -> optax.GradientTransformation:
    """DST-EE at 95%."""
    settings = {"sparsity": SPARSITY, "total_steps": 10_000, "every": EVERY} | options
    return dstee.transform(inner or optax.adamw(1e-3), key=jax.random.key(0), **settings)


def compiled_update(shapes, axis_type: AxisType, packed=False, **options) -> list[Collective]:
    """Collectives of a step over parameters split along their longest axis on 8 devices."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))

    def sharding(shape):
        able = [axis for axis, n in enumerate(shape) if n % 8 == 0]
        longest = max(able, key=lambda axis: shape[axis], default=None)
        spec = () if longest is None else [None] * longest + ["fsdp"]
        return NamedSharding(mesh, P(*spec))

    with jax.set_mesh(mesh):
        params = shapes_of(shapes, sharding)
        if packed:
            options |= {"packed": True, "blocks": dstee.blocks_of(params)}
        tx = optimizer(**options)
        bare = jax.eval_shape(tx.init, params)
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            bare,
            dstee.state_shardings(bare, params),
        )
        step = jax.jit(tx.update).lower(params, placed, params)
        return collectives(step.compile().as_text())


def report_sharded() -> None:
    weights = sum(map(math.prod, resnet50_shapes()))
    print(f"mask update of a ResNet-50 ({weights:,} weights) over 8 devices, bytes for each device")
    auto, explicit = AxisType.Auto, AxisType.Explicit
    for name, axis_type, options in [
        ("Auto axes, sharded", auto, {"selection": "sharded"}),
        ("Auto axes, bisection", auto, {"selection": "bisection"}),
        ("Auto axes, top_k", auto, {"selection": "top_k"}),
        ("Explicit axes", explicit, {}),
        ("Auto axes, packed in blocks", auto, {"selection": "sharded", "packed": True}),
    ]:
        sent = compiled_update(resnet50_shapes(), axis_type, **options)
        kinds = sorted({c.kind for c in sent})
        parts = [f"{kind} {sum(c.bytes for c in sent if c.kind == kind):,}" for kind in kinds]
        print(
            f"  {name}: at most {sum(c.bytes for c in sent):,} ({', '.join(parts)}), by "
            f"{len(sent)} instructions, at most {sum(c.trips for c in sent)} one after the other"
        )


def compiled_mean(shapes) -> tuple[int, int, int]:
    """Bytes of the dense and the active branch of `pmean`, and of a plain dense one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    params = shapes_of(shapes, lambda shape: whole)
    tx = optimizer(packed=True)
    state = jax.eval_shape(tx.init, params)

    def program(f, *args):
        specs = tuple(P() for _ in args)
        varying = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return collectives(jax.jit(varying).lower(*args).compile().as_text())

    sparse = program(lambda g, s: dstee.pmean(g, s, "data"), params, state)
    plain = program(lambda g: jax.tree.map(lambda x: jax.lax.pmean(x, "data"), g), params)
    branch = [sum(c.bytes for c in sparse if c.branches == (i,)) for i in (0, 1)]
    return branch[1], branch[0], sum(c.bytes for c in plain)


def report_mean() -> None:
    print(f"\ndata-parallel all-reduce at {SPARSITY:.0%}, a mask step every {EVERY}")
    for name, shapes in [("VGG-19", vgg19_shapes()), ("ResNet-50", resnet50_shapes())]:
        dense, active, plain = compiled_mean(shapes)
        each = ((EVERY - 1) * active + dense) / EVERY
        print(
            f"  {name}: ordinary step {active:,} B, mask step {dense:,} B, mean {each:,.0f} B, "
            f"{each / plain:.4f} of dense ({plain:,} B)"
        )


def size(tree) -> int:
    """Bytes of a tree of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def report_state() -> None:
    print(f"\nadamw's state at {SPARSITY:.0%}, bytes")
    for name, shapes in [("VGG-19", vgg19_shapes()), ("ResNet-50", resnet50_shapes())]:
        params = shapes_of(shapes, lambda shape: None)
        plain = size(jax.eval_shape(optax.adamw(1e-3).init, params))
        state = jax.eval_shape(optimizer(packed=True).init, params)
        active = sum(math.prod(x.shape) for x in jax.tree.leaves(state.indices))
        moments, indices = size(state.inner_state), size(state.indices)
        print(
            f"  {name}: dense {plain:,}, packed {moments:,} ({moments / plain:.4f}), indices "
            f"{indices:,} ({indices / active:.1f} B each), masks and counters "
            f"{size((state.masks, state.counters)):,}"
        )


if __name__ == "__main__":
    print(f"jax {jax.__version__}, optax {optax.__version__}")
    report_sharded()
    report_mean()
    report_state()
