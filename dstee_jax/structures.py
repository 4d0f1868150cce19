"""Structures: which masks are allowed. N:M, tiles, channels, constant fan-in."""

from dstee_jax.rules.ablation import *  # noqa: F403
from dstee_jax.rules.channels import *  # noqa: F403
from dstee_jax.rules.structures import *  # noqa: F403
