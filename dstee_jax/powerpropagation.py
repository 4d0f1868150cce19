"""Powerpropagation: w = theta |theta|^(alpha - 1), under which the rich get richer."""

from dstee_jax.reparameterised.powerpropagation import *  # noqa: F403
