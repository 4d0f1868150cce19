"""Methods by name: factories in the way of optax's aliases, made from the parts of `transform`.

Each takes `inner` and the keyword arguments of `dstee.transform`, which override its own
defaults, and returns the same kind of transformation.
"""

from dstee_jax.methods.alternating import ac_dc
from dstee_jax.methods.at_random import deep_r, mest, set, set_itop, smet
from dstee_jax.methods.exchange import dst_ee, rigl, rigl_itop, srigl, static
from dstee_jax.methods.gradual import admm, gap, gmp, granet, mest_ems
from dstee_jax.methods.redistribute import dsr, gse, snfs
from dstee_jax.methods.topological import cht, chts

__all__ = [
    "ac_dc",
    "admm",
    "cht",
    "chts",
    "deep_r",
    "dsr",
    "dst_ee",
    "gap",
    "gmp",
    "granet",
    "gse",
    "mest",
    "mest_ems",
    "rigl",
    "rigl_itop",
    "set",
    "set_itop",
    "smet",
    "snfs",
    "srigl",
    "static",
]
