"""What `transform` asks of an inner optimizer before it trusts it, and what it says about it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.engine.moments import memories, restarted, unmatched_state
from dstee_jax.trees import PyTree

# How many times larger than before the first update of a weight may be whose moments start again.
# Adam's is 3.2 times (1 / sqrt(10) over 1 / sqrt(1000), without the bias correction).
RESTART_LIMIT = 100.0


def check_restart(inner: optax.GradientTransformation) -> None:
    """Raise a ValueError if a grown weight would leap: moments new, counts that go on.

    Tried on four weights and a few random gradients, on the CPU, without compiling. An optimizer
    that does not take such a tree (labels by name, extra arguments) is not tried.
    """
    with jax.ensure_compile_time_eval():
        try:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                before, after = _first_updates(inner)
        except Exception:
            return  # whatever an optimizer raises for parameters that are not its own
    if not after <= RESTART_LIMIT * before and before > 0:
        raise ValueError(
            f"the inner optimizer moves a weight that has just grown by {after:.3g}, where it "
            f"moved it by {before:.3g}: it divides by a moment that starts again at "
            "zero while its step count goes on, as optax.contrib.acprop does. Take another "
            "optimizer, as optax.adamw, or keep the masks fixed (every=None)."
        )


def _first_updates(inner: optax.GradientTransformation) -> tuple[float, float]:
    """The largest update of an ordinary step, and of the one after all moments started again."""
    params, step = jnp.ones((2, 2)), inner.update
    draws = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
    state, before = inner.init(params), 0.0
    for grad in draws[:-1]:
        updates, state = step(jnp.asarray(grad), state, params)
        before = max(before, float(jnp.abs(updates).max()))
    everything = [jnp.ones(params.shape, bool)]
    state = restarted(inner, state, params, everything)
    updates, _ = step(jnp.asarray(draws[-1]), state, params)
    return before, float(jnp.abs(updates).max())


def check_matching(inner: optax.GradientTransformation, params: PyTree) -> None:
    """Warn of what no mask step resets, and refuse memories of many steps.

    Raises:
      ValueError: the state has several values for each weight.
    """
    several = memories(inner, params)
    if several:
        raise ValueError(
            f"the inner optimizer keeps several values for each weight, in {several[:3]}: it "
            "remembers gradients and steps of other masks, as optax.lbfgs does. Take another "
            "optimizer, as optax.adamw, or keep the masks fixed (every=None)."
        )
    left = unmatched_state(inner, params)
    if left:
        warnings.warn(
            f"the inner optimizer keeps {left[:3]}{' and more' if len(left) > 3 else ''}, which "
            "have no entry for each weight: mask steps leave them as they are, also where "
            "weights are dropped and grown (dstee.unmatched_state lists them).",
            stacklevel=2,
        )


def warn_of_frozen(names: list[str], frozen: list[bool]) -> None:
    """Warn of sparse leaves that the inner optimizer never updates."""
    found = [name for name, still in zip(names, frozen, strict=True) if still]
    if found:
        warnings.warn(
            f"the inner optimizer never updates {found[:3]}{' and more' if len(found) > 3 else ''}"
            ": mask steps put zeros that never change in place of what is there. Leave it dense "
            "with where=.",
            stacklevel=2,
        )


def warn_of_packed() -> None:
    """Warn of packed leaves on a TPU, which gathers and scatters single weights slowly."""
    if jax.default_backend() == "tpu":
        warnings.warn(
            "packed=True without tiles gathers and scatters single weights, which a TPU does one "
            "after the other, and compiles for minutes: pass "
            "structure=dstee.structures.tiles((128, 128)) too, or leave packed=True out "
            "(docs/accelerators.md).",
            stacklevel=3,
        )
