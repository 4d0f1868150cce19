"""Scores: what a weight is worth. Each is a function of one leaf, `score(leaf) -> array`."""

from dstee_jax.rules.sampling import *  # noqa: F403
from dstee_jax.rules.scores import *  # noqa: F403
from dstee_jax.rules.topology import *  # noqa: F403
