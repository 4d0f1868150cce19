"""Top-KAST: a forward pass with the largest weights, a gradient for these and some more."""

from dstee_jax.reparameterised.top_kast import *  # noqa: F403
