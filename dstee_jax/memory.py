"""What a method keeps of its own for each weight, beside mask and counter."""

from dstee_jax.rules.memory import *  # noqa: F403
