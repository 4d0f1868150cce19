"""Programs that `benchmarks.compiled` compiles: optimizers, selections, products, training steps.

Each by a name, `optimizer.vgg19.packed.mask_step`, that begins with what the program is and ends
with which form of it. Nothing here is run or made: all arguments are shapes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from benchmarks.mask_update import by_argsort
from benchmarks.networks import resnet50_shapes, shapes_of, vgg19_shapes
from benchmarks.targets import mesh_of
from dstee_jax.tiled_nnx import TileIndex, set_tiles
from experiments import cifar, imagenet, lm
from experiments.training.methods import tiles_divide
from experiments.training.transformer import Transformer, in_blocks, stack_axes

KEY = jax.random.key(0)
EVERY, SPARSITY = 100, 0.95
NETWORKS = {
    "layer": lambda: [(3, 3, 512, 512)],
    "vgg19": vgg19_shapes,
    "resnet50": resnet50_shapes,
}
TILE = (128, 128)  # lanes of a TPU's arrays


class Program(NamedTuple):
    """A jitted function and the shapes to compile it for, with shardings."""

    function: Any
    args: tuple[Any, ...]


def programs() -> dict[str, Callable[[str], Program]]:
    """All programs by name: of a target, the program."""
    found: dict[str, Callable[[str], Program]] = {}
    for network in NETWORKS:
        for form in ("plain", "packed", "tiles"):
            for step in ("ordinary", "mask_step"):
                found[f"optimizer.{network}.{form}.{step}"] = functools.partial(
                    optimizer, network, form, step == "mask_step"
                )
        found[f"optimizer.{network}.dense"] = functools.partial(optimizer, network)
    for form in ("dense", "ordinary"):
        found[f"optimizer.vgg19.sgd_bf16.{form}"] = functools.partial(
            optimizer,
            "vgg19",
            None if form == "dense" else "plain",
            inner=optax.sgd(0.1),
            dtype=jnp.bfloat16,
        )
    for way in ("argsort", "top_k", "bisection"):
        for k in (35_000, 235_000):
            found[f"selection.{way}.{k}"] = functools.partial(selection, way, k)
        small = functools.partial(selection, way, 250, shape=(256, 256))
        found[f"selection.{way}.small"] = small
    found["product.dense"] = product
    for side in (128, 256, 512):
        found[f"product.tiles_{side}"] = functools.partial(product, side)
    for name, build in TRAINING.items():
        for form in ("dense", "ordinary", "mask_step"):
            if (name, form) != ("lm_tiles", "dense"):
                found[f"training.{name}.{form}"] = functools.partial(build, form)
    return found


def one_device(target: str) -> NamedSharding:
    """On the first device of a target."""
    return NamedSharding(mesh_of(target, (1,)), P())


def placed(tree: Any, sharding: Any) -> Any:
    """Shapes with a sharding, or with that of each leaf."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, sharding
    )


def transformed(inner: Any, **options: Any) -> optax.GradientTransformation:
    """DST-EE at 95% around an optimizer."""
    settings = {"sparsity": SPARSITY, "total_steps": 10_000, "every": EVERY, "key": KEY} | options
    return dstee.transform(inner, **settings)


def plain_step(tx: optax.GradientTransformation) -> Any:
    """An optimizer's jitted step as optax has it, donated."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def optimizer(
    network: str | list[tuple[int, ...]],
    form: str | None = None,
    mask_step: bool = False,
    *,
    target: str,
    inner: Any = None,
    dtype: Any = jnp.float32,
    tile: tuple[int, int] = TILE,
) -> Program:
    """The optimizer's step on parameters of a network's shapes, gradients given.

    Args:
      network: its name, or the shapes of its kernels.
      form: None for the dense optimizer; 'plain', 'packed' or 'tiles' for `transform`'s.
      mask_step: whether it is a mask step.
      target: to compile for.
      inner: the optimizer, adamw by default.
      dtype: of the parameters.
      tile: of the form 'tiles'.
    """
    one, inner = one_device(target), inner or optax.adamw(1e-3)
    shapes = NETWORKS[network]() if isinstance(network, str) else network
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes_of(shapes, lambda shape: None)
    )
    if form is None:
        state = placed(jax.eval_shape(inner.init, params), one)
        params = placed(params, one)
        return Program(plain_step(inner), (params, state, params))
    options: dict[str, Any] = {} if form == "plain" else {"packed": True}
    if form == "tiles":
        options["structure"] = dstee.structures.tiles(tile)
        options["where"] = functools.partial(tiles_divide, tile)
    tx = transformed(inner, **options)
    state = jax.eval_shape(tx.init, params)
    if form == "tiles" and not mask_step:
        params = jax.eval_shape(lambda p, s: dstee.to_tiles(p, dstee.tiles(s, p)), params, state)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        return dstee.apply(tx, grads, state, params, mask_step=mask_step)

    params = placed(params, one)
    return Program(step, (params, placed(state, one), params))


def selection(
    way: str, k: int, *, target: str, shape: tuple[int, ...] = (3, 3, 512, 512)
) -> Program:
    """`drop_and_grow` of one array, by default of 2.36 M scores, or two argsorts."""
    one = one_device(target)
    scores = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one)
    args = jax.ShapeDtypeStruct(shape, bool, sharding=one), scores, scores
    if way == "argsort":
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
        return Program(by_argsort, (*args, count))

    def exchanged(mask, drop, grow):
        return dstee.drop_and_grow(mask, drop, grow, k, k_max=k, selection=way)

    return Program(jax.jit(exchanged), args)


def product(side: int | None = None, *, target: str) -> Program:
    """Forward and both gradients of a layer 4096 wide, 4096 tokens, bfloat16; tiles at 90%."""
    one, n = one_device(target), 4096
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=one)

    def gradients(x, kernel, tiles):
        def loss(x, kernel):
            return jnp.sum(dstee.matmul(x, kernel, tiles).astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(x, kernel)

    if side is None:
        return Program(jax.jit(functools.partial(gradients, tiles=None)), (x, x))
    structure = dstee.structures.tiles((side, side))
    tx = transformed(optax.identity(), structure=structure, sparsity=0.9)
    kernel, tiles = jax.eval_shape(lambda x: in_tiles(tx, {"kernel": x}), x)
    args = placed((kernel["kernel"], tiles["kernel"]), one)
    return Program(jax.jit(gradients), (x, *args))


def in_tiles(tx: optax.GradientTransformation, params: Any) -> Any:
    """Parameters as rectangles, and their tiles."""
    tiles = dstee.tiles(tx.init(params), params)
    return dstee.to_tiles(params, tiles), tiles


def train_cifar(form: str, *, target: str) -> Program:
    """The step of `experiments.cifar`, VGG-19, batch 128."""
    one = one_device(target)
    args = cifar.parse(["--model=vgg19", f"--method={'dense' if form == 'dense' else 'dst_ee'}"])
    trainer = cifar.Trainer(args, train_size=50_000)
    state = placed(jax.eval_shape(trainer.learner.init), one)
    index, images, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        for shape, dtype in (
            ((args.batch,), jnp.int32),
            ((50_000, 32, 32, 3), jnp.uint8),
            ((50_000,), jnp.int32),
        )
    )
    step = functools.partial(trainer.learn, mask_step=form == "mask_step")

    def train(state, index, images, labels):
        return step(state, trainer.batch_of(state, index, images), labels[index])

    return Program(jax.jit(train, donate_argnums=0), (state, index, images, labels))


def train_imagenet(form: str, *, target: str, shard: bool) -> Program:
    """The step of `experiments.imagenet`, ResNet-50, 64 images a device, bfloat16."""
    mesh = mesh_of(target)
    words = ["--fake_data", "--work_dir=none", "--bf16", f"--batch={64 * mesh.size}"]
    words += [f"--method={'dense' if form == 'dense' else 'dst_ee'}", "--sparsity=0.9"]
    args = imagenet.parse(words + ["--shard_params"] * shard)
    learner = imagenet.set_up(args, mesh).learner
    state = jax.eval_shape(learner.init)
    compiled = imagenet.compile_for(learner, state, mesh, shard)
    split = NamedSharding(mesh, P("data"))
    images = jax.ShapeDtypeStruct((args.batch, 224, 224, 3), jnp.uint8, sharding=split)
    labels = jax.ShapeDtypeStruct((args.batch,), jnp.int32, sharding=split)
    return Program(
        compiled.step, (placed(state, compiled.shardings), images, labels, form == "mask_step")
    )


class Size(NamedTuple):
    """Of a transformer of bytes."""

    layers: int
    width: int
    heads: int
    length: int
    batch: int  # windows of a step, on all devices


SMALL, BILLION = Size(4, 128, 4, 128, 8), Size(16, 2304, 18, 2048, 256)


def train_lm(form: str, *, target: str, size: Size, tile: tuple[int, int] | None = None) -> Program:
    """The step of `experiments.lm` at a size, DST-EE at 90%.

    The billion weights are in bfloat16 while computing, and split over all devices along an axis
    of every kernel; so is the batch. Activations are computed again in the backward pass.
    """
    mesh = mesh_of(target, (-1,) if size is BILLION else (1,))
    dtype = jnp.bfloat16 if size is BILLION else jnp.float32
    tiled = tile is not None and form != "dense"

    def build():
        network = Transformer(
            *(size.layers, size.width, size.heads, size.length),
            tiled=tile is not None,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        network.unroll, network.remat = 1, mesh.size > 1
        network.place = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, P("data"))
        )
        return network

    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01))
    options: dict[str, Any] = {"where": in_blocks, "stack_axes": stack_axes, "sparsity": 0.9}
    if tile is not None:
        options |= {"structure": dstee.structures.tiles(tile), "packed": True}
    options["selection"] = "auto" if mesh.size == 1 else "sharded"
    tx = inner if form == "dense" else transformed(inner, **options)

    def start(in_tiles):
        network = build()
        state = tx.init(nnx.state(network, nnx.Param))
        if in_tiles:
            set_tiles(network, state)
        return *nnx.split(network, nnx.Param, TileIndex)[1:], state

    def shapes(in_tiles):
        params, tiles, state = nnx.eval_shape(functools.partial(start, in_tiles))
        places = jax.tree.map(functools.partial(split_over, mesh), params)
        return placed(params, places), placed(tiles, NamedSharding(mesh, P())), state

    graph = nnx.split(jax.eval_shape(build), nnx.Param, TileIndex)[0]
    params, tiles, state = shapes(tiled)
    state = placed(state, dstee.state_shardings(state, params))  # as the rectangles, on all steps
    if tiled and form == "mask_step":
        params, tiles, _ = shapes(False)
    tokens = jax.ShapeDtypeStruct(
        (size.batch, size.length + 1), jnp.int32, sharding=NamedSharding(mesh, P("data"))
    )

    # Said of the results too: left to it, XLA replicates the parameters of a mask step.
    kept = jax.tree.map(lambda x: x.sharding, (params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=kept)
    def step(params, state, tiles, tokens):
        def loss(params):
            network = nnx.merge(graph, params, tiles, copy=True)
            return lm.losses(network(tokens[:, :-1]), tokens[:, 1:]).mean()

        grads = jax.grad(loss)(params)
        if form == "dense":
            updates, new = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), new
        return dstee.apply(tx, grads, state, params, mask_step=form == "mask_step")

    return Program(step, (params, state, tiles, tokens))


def split_over(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Split along the longest axis that the devices divide, layers excepted; else replicated."""
    able = [axis for axis in range(1, leaf.ndim) if leaf.shape[axis] % mesh.size == 0]
    if not able:
        return NamedSharding(mesh, P())
    longest = max(able, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, "data"))


TRAINING: dict[str, Callable[..., Program]] = {
    "cifar": train_cifar,
    "imagenet": functools.partial(train_imagenet, shard=False),
    "imagenet_sharded": functools.partial(train_imagenet, shard=True),
    "lm": functools.partial(train_lm, size=SMALL),
    "lm_tiles": functools.partial(train_lm, size=Size(4, 512, 8, 128, 32), tile=TILE),
    "billion": functools.partial(train_lm, size=BILLION, tile=TILE),
}
