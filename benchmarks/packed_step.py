"""Time of an optimizer step and of an all-reduce that touch the active weights only.

    python -m benchmarks.packed_step

VGG-19 (20 M weights) at 95%: `dstee.apply` with packed adamw against plain dense adamw, in one
run, medians, in turn; then `dstee.pmean` over 8 forced CPU devices against the dense mean. About
3 minutes on 2 CPU cores.
"""

import functools
import math
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dstee_jax as dstee
from benchmarks.networks import random_tree, vgg19_shapes
from benchmarks.timing import medians

EVERY = 100
OPTIONS = {"sparsity": 0.95, "total_steps": 10_000, "every": EVERY}


def two_calls(tx, grads, state, params):
    """An optimizer's step as optax has it."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class Loop:
    """A jitted step with donation, that keeps its own state between calls."""

    def __init__(self, tx, step, params, grads, count=None):
        self.state, self.grads, self.count = jax.jit(tx.init)(params), grads, count
        self.params = jax.tree.map(jnp.copy, params)
        if count is not None:
            self.params = dstee.apply_masks(self.params, self.state)
        # Donated arguments and results in one order: XLA pairs buffers of a shape in turn.
        self.step = jax.jit(lambda p, s, g: step(tx, g, s, p), donate_argnums=(0, 1))

    def __call__(self):
        if self.count is not None:  # hold the clock: always, or never, a mask step
            self.state = self.state._replace(count=jnp.int32(self.count))
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


def optimizer_step(params, grads) -> None:
    plain = optax.adamw(1e-3)
    packed = dstee.transform(plain, key=jax.random.key(0), packed=True, **OPTIONS)
    whole = dstee.transform(plain, key=jax.random.key(0), **OPTIONS)

    no_round = functools.partial(dstee.apply, mask_step=False)
    t = medians(
        {
            "dense": Loop(plain, two_calls, params, grads),
            "apply": Loop(packed, dstee.apply, params, grads, EVERY),
            "apply, mask_step=False": Loop(packed, no_round, params, grads, EVERY),
            "packed update": Loop(packed, two_calls, params, grads, EVERY),
            "unpacked update": Loop(whole, two_calls, params, grads, EVERY),
            "mask step, apply": Loop(packed, dstee.apply, params, grads, EVERY - 1),
            "mask step, unpacked": Loop(whole, two_calls, params, grads, EVERY - 1),
        },
        repeats=15,
    )
    for name, took in t.items():
        print(f"  {name:26} {took:8.1f} ms, {took / t['dense']:6.2f} of dense adamw")
    for name in ("apply", "apply, mask_step=False"):
        each = ((EVERY - 1) * t[name] + t["mask step, apply"]) / EVERY
        print(f"  {name}, mean at every={EVERY}: {each / t['dense']:.2f} of dense adamw")


def all_reduce(grads) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = dstee.transform(optax.adamw(1e-3), key=jax.random.key(0), packed=True, **OPTIONS)
    state = jax.jit(tx.init)(grads)

    def on_all(f, *args):
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=tuple(P() for _ in args), out_specs=P(), check_vma=False
        )
        return functools.partial(jax.jit(mapped), *args)

    def dense(g):
        return jax.tree.map(lambda x: jax.lax.pmean(x, "data"), g)

    t = medians(
        {
            "dense": on_all(dense, grads),
            "active": on_all(lambda g, s: dstee.pmean(g, s, "data"), grads, state),
        }
    )
    for name, took in t.items():
        print(f"  {name:20} {took:8.1f} ms, {took / t['dense']:6.2f} of the dense mean")


def main() -> None:
    params, grads = (random_tree(vgg19_shapes(), seed) for seed in (0, 1))
    weights = sum(map(math.prod, vgg19_shapes()))
    print(f"jax {jax.__version__}, {jax.devices()[0]}; {weights:,} weights, 95% sparse, adamw")
    optimizer_step(params, grads)
    if jax.device_count() < 8:
        print(f"{jax.device_count()} device: the mean of the gradients over 8 is left out")
        return
    print("mean of the gradients over 8 devices, an ordinary step")
    all_reduce(grads)


if __name__ == "__main__":
    main()
