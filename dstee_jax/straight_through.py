"""Straight-through estimation: a masked forward pass, whose gradient reaches all weights."""

from dstee_jax.reparameterised.straight_through import *  # noqa: F403
