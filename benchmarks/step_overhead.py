"""Time and memory that `transform` adds to an optimizer, on a VGG-19-sized pytree at 95%.

    python -m benchmarks.step_overhead

Of plain dense optimizers, in one run, medians, in turn, `params` and `state` donated. Also a real
VGG-19 training step at batch 128, to set the cost of the mask updates against. About 5 minutes
on 2 CPU cores.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax

import dstee_jax as dstee
from benchmarks.networks import random_tree, vgg19_shapes
from benchmarks.timing import medians
from experiments import cifar

EVERY = 100
INNERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-4),
    "clip, decay, nesterov": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
}


def update(tx, grads, state, params, **options):
    """An optimizer's step as optax has it."""
    updates, state = tx.update(grads, state, params, **options)
    return optax.apply_updates(params, updates), state


class Loop:
    """An optimizer's jitted step with donation, that keeps its own state between calls.

    Args:
      tx: the optimizer.
      how: `update` or `dstee.apply`.
      params, grads: of the step; grads None: the program computes them, from the parameters.
      begin: the state's step count at first; steps go on from there.
      donate: whether the gradients are donated too.
    """

    def __init__(self, tx, how, params, grads, begin=None, donate=False):
        self.params, self.state = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)
        if begin is not None:
            self.state = self.state._replace(count=jnp.int32(begin))
            self.params = dstee.apply_masks(self.params, self.state)
        self.grads, self.donate = grads, donate

        def step(params, state, grads):
            if grads is None:
                grads = jax.grad(loss)(params)
            return how(tx, grads, state, params)

        self.step = jax.jit(step, donate_argnums=(0, 1, 2) if donate else (0, 1))

    def prepare(self):
        """What a call needs that is not timed: gradients of its own to donate."""
        self.given = jax.tree.map(jnp.copy, self.grads) if self.donate else self.grads
        jax.block_until_ready(self.given)

    def __call__(self):
        self.params, self.state = self.step(self.params, self.state, self.given)
        return self.params


def loss(params):
    """Of a product with each kernel and 8 examples: a gradient that a dot writes to memory."""
    kernels = [k.reshape(-1, k.shape[-1]) for k in jax.tree.leaves(params)]
    outputs = [jax.random.normal(jax.random.key(0), (8, len(k))) @ k for k in kernels]
    return sum(jnp.square(y).mean() for y in outputs)


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


def ordinary_steps(name: str, inner, params, grads, **options) -> None:
    """Ordinary steps of one optimizer, by `apply` and by `update`, in one program and in two."""
    tx = transformed(inner)
    ways = {
        "apply": dstee.apply,
        "apply, mask_step=False": functools.partial(dstee.apply, mask_step=False),
        "update": update,
        "update, mask_step=False": functools.partial(update, mask_step=False),
    }
    loops = {"dense": Loop(inner, update, params, grads, **options)}
    # From step EVERY on: no mask step among those that are timed.
    loops |= {n: Loop(tx, how, params, grads, begin=EVERY, **options) for n, how in ways.items()}
    t = medians(loops, repeats=25)
    rest = ", ".join(f"{way} {t[way] / t['dense']:.2f}" for way in ways)
    print(f"{name:42} dense {t['dense']:5.1f} ms; {rest}")


def transformed(inner) -> optax.GradientTransformation:
    """DST-EE at 95% around an optimizer."""
    key = jax.random.key(0)
    return dstee.transform(inner, sparsity=0.95, total_steps=10_000, key=key, every=EVERY)


def a_whole_round(name: str, inner, params, grads) -> float:
    """EVERY steps in a row, one of them a mask step, against as many dense ones.

    Returns:
      Milliseconds that the mask step takes longer than an ordinary one.
    """
    tx = transformed(inner)
    loops = {
        "dense": Loop(inner, update, params, grads),
        "apply": Loop(tx, dstee.apply, params, grads, begin=EVERY),
    }

    def hundred(loop):
        for _ in range(EVERY):
            loop()
        return loop.params

    for loop in loops.values():
        loop.prepare()
    t = medians({n: functools.partial(hundred, loop) for n, loop in loops.items()}, repeats=3)
    print(f"{name:42} {EVERY} steps with one mask step, apply: {t['apply'] / t['dense']:.2f}")
    held = Loop(tx, dstee.apply, params, grads, begin=EVERY)
    held.prepare()

    def step(count):
        held.state = held.state._replace(count=jnp.int32(count))
        return held()

    both = {"mask": functools.partial(step, EVERY - 1), "ordinary": functools.partial(step, EVERY)}
    t = medians(both, repeats=7)
    return t["mask"] - t["ordinary"]


def main() -> None:
    params, grads = (random_tree(vgg19_shapes(), seed) for seed in (0, 1))
    weights = sum(math.prod(s) for s in vgg19_shapes())
    print(f"jax {jax.__version__}, {jax.devices()[0]}; {weights:,} weights, 95% sparse")
    print("ordinary steps, of the dense optimizer's")
    for name, inner in INNERS.items():
        ordinary_steps(name, inner, params, grads)
    nesterov = INNERS["nesterov"]
    ordinary_steps("nesterov, gradients donated", nesterov, params, grads, donate=True)
    ordinary_steps("nesterov, gradients computed in the program", nesterov, params, None)
    for name in ("sgd", "momentum", "adamw", "lion"):
        extra = a_whole_round(name, INNERS[name], params, grads)
        if name == "momentum":
            against_training_step(extra)
    state = jax.eval_shape(transformed(optax.sgd(0.1)).init, params)
    for name, tree in {"masks": state.masks, "counters": state.counters}.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        print(f"{name}: {size / weights:.2f} bytes a weight")


if __name__ == "__main__":
    main()
