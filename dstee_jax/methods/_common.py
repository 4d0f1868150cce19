"""What the factories share."""

from typing import Any, TypeAlias

import optax

Inner: TypeAlias = optax.GradientTransformation | None
Transform: TypeAlias = optax.GradientTransformationExtraArgs
Options: TypeAlias = dict[str, Any]


def half_to_nearly_none(total_steps: int) -> optax.Schedule:
    """The rate of SNFS, ITOP and GraNet: from 0.5 by cosine to 0.005 at the end."""
    return optax.cosine_decay_schedule(0.5, max(total_steps, 1), alpha=0.01)


def itop(total_steps: int) -> Options:
    """ITOP's setting: the optimizer steps first, rounds to the end, just-dropped may regrow."""
    return {
        "total_steps": total_steps,
        "drop_fraction": half_to_nearly_none(total_steps),
        "stop": 1.0,
        "regrow": True,
        "update_weights": True,
    }
