"""Scales: by how much the update of an active weight is multiplied."""

from dstee_jax.rules.scales import *  # noqa: F403
