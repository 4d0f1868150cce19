"""SIS: sparsify a trained layer so that its outputs still follow from its inputs."""

from dstee_jax.masks.inclusion import *  # noqa: F403
