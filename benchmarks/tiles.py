"""Time of products and of training with kernels in tiles, of the best dense form.

    python -m benchmarks.tiles                 # all, about 25 minutes on 2 CPU cores
    python -m benchmarks.tiles mlp layers      # some of it

Medians of pairs in turn, in one run, on a machine that does nothing else. Above 1: tiles are
faster. `mlp` is a whole training step of a 4 x 1024 MLP with adamw, all donated; `candidates` its
mask step, dense and by candidates, over an ordinary step: below 1 is faster; `lm` one of
`experiments.lm` at width 512; `layers` forward and gradients of one layer; `convolutions` those
of ResNet-50's shapes. Of a trained network: `python -m benchmarks.inference`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dstee_jax as dstee
from benchmarks.timing import medians
from dstee_jax.tiled_nnx import TileIndex, set_tiles
from experiments import lm as program

KEY = jax.random.key(0)
EVERY = 100
TILES = ((16, 16), (32, 32), (64, 64), (128, 128), (1, 32))


def normal(i, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape, dtype)


def tiles_of(shape, tile, sparsity):
    """Random tiles of a kernel, and its rectangle."""
    structure = dstee.structures.tiles(tile)
    tx = dstee.transform(
        optax.identity(), structure=structure, sparsity=sparsity, total_steps=1, key=KEY, every=None
    )
    kernel = {"kernel": normal(1, shape) / np.sqrt(shape[-2])}
    tiles = dstee.tiles(tx.init(kernel), kernel)
    return kernel["kernel"], dstee.to_tiles(kernel, tiles)["kernel"], tiles["kernel"]


def ratio(dense, tiled, repeats=9) -> str:
    """Two thunks: dense time over tiled time."""
    t = medians({"dense": dense, "tiled": tiled}, repeats=repeats)
    return f"{t['dense'] / t['tiled']:.2f}"


def pair(function, x, dense, rectangle, tiles):
    """A function of (x, kernel, tiles), jitted, as a thunk of each form."""
    run = jax.jit(function)
    return functools.partial(run, x, dense, None), functools.partial(run, x, rectangle, tiles)


def layers() -> None:
    """Forward and both gradients of one layer."""

    def step(x, kernel, tiles):
        return jax.value_and_grad(lambda x, k: jnp.square(dstee.matmul(x, k, tiles)).sum(), (0, 1))(
            x, kernel
        )

    print("one layer, forward and gradients; sparsity 80, 90, 95%")
    for width in (1024, 4096):
        for batch in (256, 2048):
            for tile in TILES:
                found = []
                for sparsity in (0.8, 0.9, 0.95):
                    forms = tiles_of((width, width), tile, sparsity)
                    thunks = pair(step, normal(2, (batch, width)), *forms)
                    found.append(ratio(*thunks, repeats=7 if width * batch < 2**22 else 3))
                print(f"  {width:5} x {batch:4}, {tile[0]:3} x {tile[1]:3}: {', '.join(found)}")


def convolutions() -> None:
    """Forward and both gradients, batch 16, of ResNet-50's shapes."""
    print("convolutions, forward and gradients, batch 16, tiles of 32 x 32; sparsity 80, 90, 95%")
    for places, window, inputs, outputs in (
        (28, 1, 512, 128),
        (28, 3, 128, 128),
        (14, 1, 256, 1024),
        (14, 3, 256, 256),
        (7, 1, 2048, 512),
        (7, 3, 512, 512),
    ):

        def step(x, kernel, tiles):
            def loss(x, k):
                return jnp.square(dstee.conv(x, k, tiles)).sum()

            return jax.value_and_grad(loss, (0, 1))(x, kernel)

        x, shape = normal(2, (16, places, places, inputs)), (window, window, inputs, outputs)
        found = []
        for sparsity in (0.8, 0.9, 0.95):
            found.append(ratio(*pair(step, x, *tiles_of(shape, (32, 32), sparsity)), repeats=5))
        print(
            f"  {places:2} x {places:2}, {window} x {window}, {inputs:4} to {outputs:4}: "
            f"{', '.join(found)}"
        )


def in_tiles(inner, sparsity, tile, **options):
    """DST-EE around an optimizer, with a mask step every EVERY steps."""
    return dstee.transform(
        inner,
        structure=dstee.structures.tiles(tile),
        packed=True,
        sparsity=sparsity,
        distribution=dstee.uniform,
        total_steps=10_000,
        every=EVERY,
        key=KEY,
        **options,
    )


class Training:
    """A donated training step that keeps its own state: dense, or with kernels in tiles.

    Args:
      loss: `(params, tiles, x, y) -> scalar`.
      params, batch: of the loss.
      tx: the optimizer; with `dstee.transform` in it, `rounds` are its mask steps.
    """

    def __init__(self, loss, params, batch, tx, rounds=None):
        self.params, self.batch, self.tx = jax.tree.map(jnp.copy, params), batch, tx
        self.state, self.rounds = jax.jit(tx.init)(params), rounds
        self.tiles = nothing = jax.tree.map(lambda _: None, params)
        shapes = jax.eval_shape(lambda: params)
        if rounds is not None:
            self.params = dstee.apply_masks(self.params, self.state)
            self.tiles = dstee.tiles(self.state, shapes)
            self.params = dstee.to_tiles(self.params, self.tiles)
        self.begin(0)

        @functools.partial(jax.jit, static_argnames="dense", donate_argnums=(0, 1))
        def step(params, state, tiles, batch, dense):
            if dense:
                params, tiles = dstee.to_dense(params, tiles), nothing
            grads = jax.grad(loss)(params, tiles, *batch)
            if rounds is None:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state, tiles
            params, state = dstee.apply(tx, grads, state, params, mask_step=dense)
            if dense:
                tiles = dstee.tiles(state, shapes)
                params = dstee.to_tiles(params, tiles)
            return params, state, tiles

        self.step = step

    def begin(self, count):
        """Go on as after that many steps."""
        self.count = count
        if self.rounds is not None:
            self.state = self.state._replace(count=jnp.int32(count))

    def __call__(self):
        self.count += 1
        due = self.rounds is not None and self.count in self.rounds
        held = self.params, self.state, self.tiles
        self.params, self.state, self.tiles = self.step(*held, self.batch, due)
        return self.params


def training(name, loss, params, batch, inner, sparsity, tile, **options):
    """Ordinary steps, and a hundred in a row with one mask step, of a dense step's time."""
    tx = in_tiles(inner, sparsity, tile, **options)
    dense = Training(loss, params, batch, inner)
    tiled = Training(loss, params, batch, tx, set(dstee.mask_steps_of(tx)))
    tiled.begin(EVERY)  # no mask step soon
    ordinary = ratio(dense, tiled)

    def some(loop, steps):
        for _ in range(steps):
            loop()
        return loop.params

    tiled.begin(EVERY)
    tiled_hundred = functools.partial(some, tiled, EVERY)
    t = medians({"dense": functools.partial(some, dense, 10), "tiled": tiled_hundred}, repeats=3)
    mean = f"{EVERY / 10 * t['dense'] / t['tiled']:.2f}"
    actual = 1 - float(dstee.density(tiled.state))
    what = f"{name}, tiles of {tile[0]} x {tile[1]}, {actual:.1%}"
    print(f"  {what}: {ordinary}; with one mask step in {EVERY} steps: {mean}", flush=True)


def mlp() -> None:
    """A whole training step of a 4 x 1024 MLP."""

    print("whole training step, adamw")
    params = {str(i): {"kernel": normal(i, (1024, 1024)) / 32} for i in range(4)}
    for batch in (256, 2048):
        data = normal(5, (batch, 1024)), normal(6, (batch, 1024))
        for sparsity, tile in ((0.9, (32, 32)), (0.94, (32, 32)), (0.95, (16, 16)), (0.9, (1, 32))):
            name = f"MLP 4 x 1024, batch {batch}"
            training(name, mlp_loss, params, data, optax.adamw(1e-3), sparsity, tile)


def mlp_loss(params, tiles, x, y):
    """Of a 4 x 1024 MLP, each form with its best layout."""
    axis = -1 if tiles["0"]["kernel"] is None else 0
    x, y = (x, y) if axis else (x.T, y.T)
    for name in ("0", "1", "2", "3"):
        active = tiles[name]["kernel"]
        x = jax.nn.relu(dstee.matmul(x, params[name]["kernel"], active, axis=axis))
    return jnp.mean(jnp.square(x - y))


class MaskStep:
    """One step of an MLP in tiles, again and again on the same state, of which it gives a copy.

    Args:
      share: of candidates; None for a dense mask step, 0 for an ordinary step.
    """

    def __init__(self, params, batch, tx, share):
        shapes = jax.eval_shape(lambda: params)
        state = jax.jit(tx.init)(params)._replace(count=jnp.int32(EVERY - 1))
        self.given = dstee.to_tiles(params, dstee.tiles(state, shapes)), state
        self.batch, self.held = batch, None

        @functools.partial(jax.jit, donate_argnums=0)
        def step(held, batch):
            params, state = held
            now = tiles = dstee.tiles(state, shapes)
            options = {"mask_step": False}
            if share is None:
                params, tiles = dstee.to_dense(params, now), dstee.no_tiles(now)
                options = {}
            elif share:
                tiles = dstee.tiles(state, shapes, candidates=share)
                params, options = dstee.to_tiles(params, tiles, of=now), {"tiles": tiles}
            grads = jax.grad(mlp_loss)(params, tiles, *batch)
            params, state = dstee.apply(tx, grads, state, params, **options)
            if share != 0:
                of = tiles if share else None
                params = dstee.to_tiles(params, dstee.tiles(state, shapes), of=of)
            return params, state

        self.program = step.lower(self.given, batch).compile()

    def prepare(self):
        """Not timed."""
        self.held = jax.block_until_ready(jax.tree.map(jnp.copy, self.given))

    def __call__(self):
        return self.program(self.held, self.batch)

    @property
    def mib(self):
        """Of temporary memory."""
        return self.program.memory_analysis().temp_size_in_bytes / 2**20


def candidates(batches=(256, 2048), sparsities=(0.9, 0.95)) -> None:
    """A mask step of a 4 x 1024 MLP: dense, and by candidates; of an ordinary step's time."""
    print("mask step of the MLP, time of an ordinary step's, adamw; temporary memory")
    params = {str(i): {"kernel": normal(i, (1024, 1024)) / 32} for i in range(4)}
    for batch in batches:
        data = normal(5, (batch, 1024)), normal(6, (batch, 1024))
        for sparsity in sparsities:
            tile = (32, 32) if sparsity < 0.95 else (16, 16)
            tx = in_tiles(optax.adamw(1e-3), sparsity, tile)
            shares = {"ordinary": 0, "dense": None, "0.5": 0.5, "1.0": 1.0, "2.0": 2.0}
            steps = {name: MaskStep(params, data, tx, share) for name, share in shares.items()}
            t = medians(steps, repeats=15 if batch < 1024 else 7)
            print(f"  batch {batch}, {sparsity:.0%}, tiles of {tile[0]} x {tile[1]}:")
            for name, step in steps.items():
                what = name if name in ("ordinary", "dense") else f"{name} candidates"
                times = f"{t[name]:7.2f} ms, {t[name] / t['ordinary']:5.2f}"
                print(f"    {what:>14}: {times}, {step.mib:6.1f} MiB", flush=True)


class LanguageModel:
    """An ordinary training step of `experiments.lm`'s network, that keeps its own state."""

    def __init__(self, tile=None, sparsity=0.9):
        model = program.Transformer(
            *(4, 512, 8, 128), tiled=tile is not None, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        tx = optax.adamw(1e-3)
        if tile is not None:
            parts = {"where": program.in_blocks, "stack_axes": program.stack_axes}
            tx = in_tiles(tx, sparsity, tile, **parts)
        state = jax.jit(tx.init)(nnx.state(model, nnx.Param))
        if tile is not None:
            self.density = float(dstee.density(state))
            set_tiles(model, state)
        graph, params, self.tiles = nnx.split(model, nnx.Param, TileIndex)
        self.held = params, state
        self.tokens = jax.random.randint(KEY, (32, 129), 0, 256)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(held, tiles, tokens):
            def loss(params):
                model = nnx.merge(graph, params, tiles, copy=True)
                return program.losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()

            params, state = held
            grads = jax.grad(loss)(params)
            options = {} if tile is None else {"mask_step": False}
            return dstee.apply(tx, grads, state, params, **options)

        self.step = step

    def __call__(self):
        self.held = self.step(self.held, self.tiles, self.tokens)
        return self.held


def lm() -> None:
    """An ordinary step of the language model: 4 blocks, width 512, 32 x 128 tokens."""
    print("whole training step of experiments.lm, width 512, 32 x 128 tokens, adamw")
    for sparsity in (0.9, 0.95):
        tiled = LanguageModel((32, 32), sparsity)
        found = ratio(LanguageModel(), tiled, repeats=5)
        print(f"  tiles of 32 x 32, {1 - tiled.density:.1%} of the blocks' kernels: {found}")


PARTS = {f.__name__: f for f in (mlp, candidates, lm, layers, convolutions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0]}; dense time over time with tiles")
    for part in args.parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
