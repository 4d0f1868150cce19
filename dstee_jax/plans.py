"""Plans: how many weights each leaf drops and grows in a round."""

from dstee_jax.rules.phases import *  # noqa: F403
from dstee_jax.rules.plans import *  # noqa: F403
