"""Penalties: what a method adds to the gradient of active weights before the optimizer sees it."""

from dstee_jax.rules.penalties import *  # noqa: F403
