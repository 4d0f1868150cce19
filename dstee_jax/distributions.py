"""Distributions: how a network's sparsity is shared among its layers."""

from dstee_jax.masks.distributions import *  # noqa: F403
