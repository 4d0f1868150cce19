"""STR: weights behind a learned soft threshold, one for each leaf."""

from dstee_jax.reparameterised.soft_threshold import *  # noqa: F403
