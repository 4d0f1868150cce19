"""Experiments: small, forkable training programs that use dstee_jax as its users do."""
