"""Time and memory that `transform` adds to an optimizer, on a VGG-19-sized pytree at 95%.

    python -m benchmarks.step_overhead

Also a real VGG-19 training step at batch 128, to set the cost of the mask updates against.
About 4 minutes on 2 CPU cores.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

import dstee_jax as dstee
from benchmarks.timing import medians, random_tree, vgg19_shapes
from experiments import cifar

EVERY = 100


class Loop:
    """An optimizer's jitted step with donation, that keeps its own state between calls."""

    def __init__(self, tx, params, grads, count=None):
        self.params, self.state = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        self.grads, self.count = grads, count

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = step

    def __call__(self):
        if self.count is not None:  # hold the clock: always, or never, a mask step
            self.state = self.state._replace(count=jnp.int32(self.count))
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


def against_training_step(extra: float) -> None:
    """What `extra` milliseconds every EVERY steps are of a real VGG-19 training step."""
    args = cifar.parse(["--model=vgg19", "--method=dst_ee", "--epochs=2"])
    trainer = cifar.Trainer(args, train_size=50_000)
    images, labels = jnp.zeros((256, 32, 32, 3), jnp.uint8), jnp.zeros(256, jnp.int32)
    held = [trainer.init()]

    def step():
        held[0], loss = trainer.step(held[0], jnp.arange(128), images, labels, False)
        return loss

    took = medians({"step": step}, repeats=3)["step"]
    print(
        f"  a VGG-19 training step at batch 128 takes {took:,.0f} ms: mask updates are "
        f"{extra / EVERY / took:.3%} of it"
    )


def main() -> None:
    params, grads = (random_tree(vgg19_shapes(), seed) for seed in (0, 1))
    weights = sum(math.prod(s) for s in vgg19_shapes())
    print(f"jax {jax.__version__}, {jax.devices()[0]}; {weights:,} weights, 95% sparse")
    inners = {
        "sgd": optax.sgd(0.1),
        "sgd, momentum": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(1e-3),
    }
    for name, inner in inners.items():
        tx = dstee.transform(
            inner, sparsity=0.95, total_steps=10_000, key=jax.random.key(0), every=EVERY
        )
        t = medians(
            {
                "dense": Loop(inner, params, grads),
                "ordinary": Loop(tx, params, grads, count=EVERY),
                "mask": Loop(tx, params, grads, count=EVERY - 1),
            },
            repeats=15,
        )
        amortised = ((EVERY - 1) * t["ordinary"] + t["mask"]) / EVERY
        print(
            f"{name:14} dense {t['dense']:6.1f} ms, ordinary step {t['ordinary']:6.1f} ms "
            f"({t['ordinary'] / t['dense']:.2f}x), mask step {t['mask']:6.1f} ms, amortised at "
            f"every={EVERY}: {amortised / t['dense']:.2f}x"
        )
        if name == "sgd, momentum":
            against_training_step(t["mask"] - t["ordinary"])
    state = jax.eval_shape(tx.init, params)
    parts = {"masks": state.masks, "counters": state.counters}
    for name, tree in parts.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        print(f"{name}: {size / weights:.2f} bytes a weight")


if __name__ == "__main__":
    main()
