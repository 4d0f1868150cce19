"""Dynamic sparse training for JAX: networks that stay sparse from the first step to the last."""

from dstee_jax import (
    at_init,
    distributions,
    inclusion,
    memory,
    methods,
    penalties,
    plans,
    powerpropagation,
    scales,
    scores,
    soft_threshold,
    straight_through,
    structures,
    top_kast,
    trees,
)
from dstee_jax.devices.allreduce import pmean, replicas_agree
from dstee_jax.devices.shardings import blocks_of, state_shardings
from dstee_jax.distributions import erk, uniform
from dstee_jax.engine.apply import apply
from dstee_jax.engine.carry_over import carry_over
from dstee_jax.engine.compatible import check
from dstee_jax.engine.moments import unmatched_state
from dstee_jax.exporting import register_for_export
from dstee_jax.files.convert import save_dense, to_bcsr, to_scipy
from dstee_jax.files.load import Saved, load
from dstee_jax.files.save import save
from dstee_jax.inference.choose import inference
from dstee_jax.inference.shrink import Shrunk, shrink
from dstee_jax.masks.given import apply_masks
from dstee_jax.masks.random import init_masks
from dstee_jax.masks.rescale import rescale
from dstee_jax.masks.where import kernels
from dstee_jax.measure.flops import Flops, flops, training_flops
from dstee_jax.measure.metrics import (
    density,
    empty_units,
    exploitation_degree,
    exploration_degree,
    summary,
)
from dstee_jax.rules.schedule import mask_steps
from dstee_jax.selection.drop_and_grow import drop_and_grow
from dstee_jax.state import Leaf, SparseState, get_state, get_states, seed_axes
from dstee_jax.tiling.forms import no_tiles, tiles, to_dense, to_tiles
from dstee_jax.tiling.pays import TilesPay, tiles_pay
from dstee_jax.tiling.products import conv, matmul
from dstee_jax.tiling.tiles import Tiles
from dstee_jax.transform import dense_steps_of, mask_steps_of, transform

__version__ = "0.1.0"

__all__ = [
    "Flops",
    "Leaf",
    "Saved",
    "Shrunk",
    "SparseState",
    "Tiles",
    "TilesPay",
    "apply",
    "apply_masks",
    "at_init",
    "blocks_of",
    "carry_over",
    "check",
    "conv",
    "dense_steps_of",
    "density",
    "distributions",
    "drop_and_grow",
    "empty_units",
    "erk",
    "exploitation_degree",
    "exploration_degree",
    "flops",
    "get_state",
    "get_states",
    "inclusion",
    "inference",
    "init_masks",
    "kernels",
    "load",
    "mask_steps",
    "mask_steps_of",
    "matmul",
    "memory",
    "methods",
    "no_tiles",
    "penalties",
    "plans",
    "pmean",
    "powerpropagation",
    "register_for_export",
    "replicas_agree",
    "rescale",
    "save",
    "save_dense",
    "scales",
    "scores",
    "seed_axes",
    "shrink",
    "soft_threshold",
    "state_shardings",
    "straight_through",
    "structures",
    "summary",
    "tiles",
    "tiles_pay",
    "to_bcsr",
    "to_dense",
    "to_scipy",
    "to_tiles",
    "top_kast",
    "training_flops",
    "transform",
    "trees",
    "uniform",
    "unmatched_state",
]
