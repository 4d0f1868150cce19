"""Methods whose network has parameters that are a function of the trained ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dstee_jax as dstee
from dstee_jax import powerpropagation, soft_threshold, straight_through, top_kast

Distribution = Callable[..., Any]

THRESHOLD_START = -5.0  # STR's first threshold is sigmoid(-5) = 0.0067
ALPHA = 2.0  # of powerpropagation
AT_TARGET = 0.75  # share of training after which STE's masks have the target sparsity
BACKWARD = 5  # Top-KAST's gradients reach so many times the weights of the forward pass


class Reparameterisation(NamedTuple):
    """Where the parameters of the network come from; by default they are the trained ones.

    Attributes:
      init: `(params) -> trained`, before the first step.
      apply: `(trained, step) -> (params, penalty)` after that many steps (traced): the network's
        parameters, and what is added to the loss.
    """

    init: Callable[[Any], Any] = lambda params: params
    apply: Callable[[Any, Any], tuple[Any, Any]] = lambda trained, step: (trained, 0.0)


def thresholds(**_: Any) -> Reparameterisation:
    """STR: learned thresholds, whose weight decay sets the sparsity."""
    init = functools.partial(soft_threshold.init, start=THRESHOLD_START)
    return Reparameterisation(init, lambda trained, step: (soft_threshold.apply(trained), 0.0))


def powers(**_: Any) -> Reparameterisation:
    """Powerpropagation: small weights move little. The method around it prunes."""
    init = functools.partial(powerpropagation.init, alpha=ALPHA)
    return Reparameterisation(init, lambda t, step: (powerpropagation.apply(t, alpha=ALPHA), 0.0))


def ste(
    *, at_random: bool, sparsity: float, total_steps: int, distribution: Distribution
) -> Reparameterisation:
    """Straight-through estimation: the largest weights, or new random ones on every step."""
    share = optax.polynomial_schedule(0.0, 1.0, 3, max(1, round(AT_TARGET * total_steps)))

    def apply(trained, step):
        key = jax.random.fold_in(jax.random.key(0), step) if at_random else None
        masks = straight_through.masks(
            trained, sparsity, share=share(step), key=key, distribution=distribution
        )
        return straight_through.apply(trained, masks), 0.0

    return Reparameterisation(apply=apply)


def sets_of_top_kast(
    *, sparsity: float, total_steps: int, distribution: Distribution
) -> Reparameterisation:
    """Top-KAST, with new sets on every step, to the end, and the distribution of the others."""
    backward = max(0.0, 1 - BACKWARD * (1 - sparsity))

    def apply(trained, step):
        sets = top_kast.sets(trained, sparsity, backward, distribution=distribution)
        return top_kast.apply(trained, sets), top_kast.penalty(trained, sets)

    return Reparameterisation(apply=apply)


def nonzero(params: Any) -> Any:
    """Masks of the weights that are not zero, of kernels; `optax.MaskedNode()` for the rest."""

    def of(path, leaf):
        return leaf != 0 if dstee.kernels(path, leaf) else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(of, params)


def density(params: Any) -> jax.Array:
    """Share of the weights of kernels that are not zero; float32, shape ()."""
    masks = jax.tree.leaves(nonzero(params))
    return sum(jnp.sum(m, dtype=jnp.float32) for m in masks) / sum(m.size for m in masks)
