"""Time of drop-and-grow: one array against two full argsorts, its growth with size, networks.

    python -m benchmarks.mask_update

About 3 minutes on 2 CPU cores.
"""

import functools
import time

import jax
import jax.numpy as jnp
import optax

import dstee_jax as dstee
from benchmarks.networks import random_tree, resnet50_shapes, vgg19_shapes
from benchmarks.timing import medians

DROP_FRACTION = 0.3


@jax.jit
def by_argsort(mask, drop_score, grow_score, k):
    """Drop-and-grow with two full sorts of the array: the plain way."""

    def ranks(score):
        order = jnp.argsort(-score.reshape(-1), stable=True)
        return jnp.zeros(score.size, jnp.int32).at[order].set(jnp.arange(score.size))

    dropped = ranks(jnp.where(mask, -drop_score, -jnp.inf)).reshape(mask.shape) < k
    grown = ranks(jnp.where(mask, -jnp.inf, grow_score)).reshape(mask.shape) < k
    return (mask & ~dropped) | grown


def one_array(shape: tuple[int, ...], sparsity: float) -> tuple:
    """Mask, drop score, grow score and k of one array."""
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    drop, grow = (jnp.abs(jax.random.normal(key, shape)) for key in (k2, k3))
    mask = dstee.init_masks(drop, sparsity, k1, where=lambda path, leaf: True)
    return mask, drop, grow, int(DROP_FRACTION * int(mask.sum()))


def against_argsort() -> None:
    print("one array of 2,359,296 float32 weights, milliseconds (median of 7, in turn)")
    print("sparsity        k   argsort  top_k  bisection   argsort/bisection")
    for sparsity in (0.9, 0.95, 0.98):
        *arrays, k = one_array((3, 3, 512, 512), sparsity)
        call = functools.partial(dstee.drop_and_grow, *arrays, k, k_max=k)
        t = medians(
            {
                "argsort": lambda a=arrays, k=k: by_argsort(*a, k),
                "top_k": functools.partial(call, selection="top_k"),
                "bisection": functools.partial(call, selection="bisection"),
            }
        )
        same = by_argsort(*arrays, k) == call(selection="bisection")
        assert same.all(), "the two masks differ"
        print(
            f"{sparsity:8.0%} {k:8,} {t['argsort']:9.0f} {t['top_k']:6.0f} {t['bisection']:10.1f} "
            f"{t['argsort'] / t['bisection']:19.0f}x"
        )


def growth() -> None:
    print("\ngrowth with size at 95% (auto), relative to size")
    first = None
    for n in (10**6, 10**7, 10**8):
        *arrays, k = one_array((n,), 0.95)
        call = functools.partial(dstee.drop_and_grow, *arrays, k, k_max=k)
        t = medians({"auto": call}, repeats=3)["auto"]
        first = first or t / n
        print(f"{n:12,} weights {t:9.1f} ms, per weight {t / n / first:5.2f}x of the first")


def networks() -> None:
    print("\nall leaves of a network at 95%: mask step through transform(), auto against top_k")
    for name, shapes in [("VGG-19", vgg19_shapes()), ("ResNet-50", resnet50_shapes())]:
        params = random_tree(shapes)
        calls = {}
        for selection in ("auto", "top_k"):
            tx = dstee.transform(
                sparsity=0.95,
                total_steps=100,
                key=jax.random.key(0),
                every=2,
                selection=selection,
            )
            state = jax.jit(tx.init)(params)._replace(count=jnp.int32(1))
            zeros = jax.tree.map(jnp.zeros_like, params)
            begin = time.perf_counter()
            masks = jax.jit(lambda s, p, g, z, tx=tx: tx.update(z, s, p, grad=g)[1].masks).lower(
                state, params, params, zeros
            )
            compiled = masks.compile()
            took = time.perf_counter() - begin
            print(f"  {name} {selection}: {len(shapes)} leaves, compiled in {took:.1f} s")
            calls[selection] = functools.partial(compiled, state, params, params, zeros)
        t = medians(calls, repeats=3)
        ratio = t["top_k"] / t["auto"]
        print(f"  {name}: auto {t['auto']:.0f} ms, top_k {t['top_k']:.0f} ms, ratio {ratio:.1f}x")


def many_leaves() -> None:
    print("\na transformer of 28 layers, 200 leaves, adamw around it at 95%: compile time")
    d, params = 512, {}
    for i in range(28):
        shapes = {name: (d, d) for name in ("query", "key", "value", "out")}
        shapes |= {"gate": (d, 4 * d), "up": (d, 4 * d), "down": (4 * d, d)}
        params[f"layers_{i}"] = {n: {"kernel": s} for n, s in shapes.items()}
    params |= {name: {"kernel": (d, 1000 + i)} for i, name in enumerate("abcd")}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), params, is_leaf=lambda x: type(x) is tuple
    )
    tx = dstee.transform(optax.adamw(1e-3), sparsity=0.95, total_steps=1000, key=jax.random.key(0))
    state = jax.eval_shape(tx.init, params)
    begin = time.perf_counter()
    lowered = jax.jit(lambda g, s, p: tx.update(g, s, p)).lower(params, state, params)
    traced = time.perf_counter()
    lowered.compile()
    took = time.perf_counter() - traced
    print(f"  traced in {traced - begin:.1f} s, compiled in {took:.1f} s")


if __name__ == "__main__":
    print(f"jax {jax.__version__}, {jax.devices()[0]}, optax {optax.__version__}")
    against_argsort()
    growth()
    networks()
    many_leaves()
