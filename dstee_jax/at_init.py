"""Masks from before training: SNIP, GraSP, SynFlow, magnitude, random."""

from dstee_jax.masks.at_init import *  # noqa: F403
