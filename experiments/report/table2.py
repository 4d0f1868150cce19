"""The cost columns of the paper's Table 2: FLOPs of sparse ResNet-50 on ImageNet, no training.

    python -m experiments.report.table2

Counts the FLOPs of ResNet-50 v1.5 on one 224-pixel image with masks of each method's
distribution (`dstee.flops`), and what a training step costs with them (`dstee.training_flops`).
Where the allocation emerges in training, the costs come from recorded masks: give a checkpoint
of `experiments.imagenet` as `--masks dsr=DIR`, or the row says n/a.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dstee_jax as dstee
from dstee_jax.distributions import active_counts
from dstee_jax.trees import leaves_with_path, path_name
from experiments.training.arguments import Parser
from experiments.training.checkpoints import Checkpoints, by_name
from experiments.training.methods import DISTRIBUTIONS
from experiments.training.models import ResNet50

EPOCHS, IMAGES = 100, 1_281_167
DELTA_T = 100
SPARSITIES = (0.8, 0.9)

LAYOUTS = ["uniform", "uniform_first_dense", "erk"]
# Method: distribution of its masks ('emerges' in training), ordinary steps between two dense
# gradients (None: never), and the paper's columns: training and inference at 80%, then at 90%.
ROWS: dict[str, tuple[str, int | None, tuple[str, str, str, str]]] = {
    "snip": ("emerges", None, ("0.23", "0.23", "0.10", "0.10")),
    "grasp": ("emerges", None, ("0.23", "0.23", "0.10", "0.10")),
    "deep_r": ("emerges", None, ("n/a", "n/a", "n/a", "n/a")),
    "snfs": ("emerges", 0, ("n/a", "n/a", "n/a", "n/a")),
    "dsr": ("emerges", None, ("0.40", "0.40", "0.30", "0.30")),
    "set": ("uniform", None, ("0.23", "0.23", "0.10", "0.10")),
    "rigl": ("uniform", DELTA_T, ("0.23", "0.23", "0.10", "0.10")),
    "mest": ("uniform", None, ("0.23", "0.23", "0.10", "0.10")),
    "rigl_itop": ("erk", 4000, ("0.42", "0.42", "0.25", "0.24")),
    "dst_ee": ("erk", DELTA_T, ("0.23", "0.42", "0.10", "0.24")),
}


@functools.cache
def network() -> tuple[Callable[..., jax.Array], Any]:
    """`apply(params, images)` of ResNet-50 in evaluation mode, and the shapes of its params."""
    make = functools.partial(ResNet50, 1000, large=True, dtype=jnp.float32)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    model.eval()
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(params, images):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
        return nnx.merge(graph, params, zeros)(images)

    return apply, params


def cost(masks: Any = None) -> dstee.Flops:
    """FLOPs of one 224-pixel image."""
    apply, params = network()
    return dstee.flops(
        apply, params, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), masks=masks
    )


def masks_of(distribution: str, sparsity: float) -> Any:
    """Masks of ResNet-50 by one of the experiments' distributions.

    FLOPs depend on the number of active weights in each leaf alone: the first ones are active.
    """
    _, params = network()
    leaves = [(path_name(path), leaf, path) for path, leaf in leaves_with_path(params)]
    shapes = {name: leaf.shape for name, leaf, path in leaves if dstee.kernels(path, leaf)}
    counts = active_counts(shapes, sparsity, DISTRIBUTIONS[distribution])
    masks = [
        (np.arange(leaf.size) < counts[name]).reshape(leaf.shape)
        if name in counts
        else optax.MaskedNode()
        for name, leaf, _ in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def recorded_masks(directory: Path) -> Any:
    """The masks in the last checkpoint of a run of `experiments.imagenet` with ResNet-50."""
    saved = Checkpoints(directory, keep=True).restore_plain()["opt_state"]["masks"]
    found = by_name(saved)
    paths = [path_name(path) for path, _ in leaves_with_path(network()[1])]
    masks = [found.get(path, optax.MaskedNode()) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(network()[1]), masks)


def table(recorded: dict[str, dict[float, Any]]) -> str:
    """Rows of methods: training and inference FLOPs as shares of the dense network's."""
    dense = cost().dense
    costs = {(d, s): cost(masks_of(d, s)) for d in LAYOUTS for s in SPARSITIES}
    head = " | ".join(
        f"{what} {s:.0%} | paper" for s in SPARSITIES for what in ("training", "inference")
    )
    lines = [f"| method | masks | {head} |", "| --- | --- |" + " --- | --- |" * 4]
    for method, (layout, every, paper) in ROWS.items():
        layouts = LAYOUTS[:2] if layout == "uniform" else [layout]
        for one in ["recorded"] if method in recorded else layouts:
            cells = []
            for s in SPARSITIES:
                f = recorded.get(method, costs).get(s if method in recorded else (one, s))
                sparse = f.sparse if f else None
                training = sparse and dstee.training_flops(dense, sparse, every=every) / (3 * dense)
                cells += [_share(training), _share(sparse and sparse / dense)]
            row = " | ".join(f"{c} | {p}" for c, p in zip(cells, paper, strict=True))
            lines.append(f"| {method} | {one} | {row} |")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}×"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--masks", nargs="*", default=[], metavar="METHOD=DIR", help="checkpoints to read masks of")
    args = parser.parse_args(argv)
    recorded: dict[str, dict[float, Any]] = {}
    for given in args.masks:
        method, _, directory = given.partition("=")
        if method not in ROWS or not directory:
            parser.error(f"--masks {given}: give METHOD=DIR, METHOD one of {', '.join(ROWS)}.")
        try:
            masks = recorded_masks(Path(directory))
        except FileNotFoundError as error:
            parser.error(str(error))
        kept = float(np.mean(np.concatenate([np.ravel(m) for m in jax.tree.leaves(masks)])))
        nearest = min(SPARSITIES, key=lambda s: abs(1 - s - kept))
        recorded.setdefault(method, {})[nearest] = cost(masks)
    dense = cost().dense
    total = 3 * dense * EPOCHS * IMAGES
    print(
        f"ResNet-50 v1.5 at 224 pixels: {dense:.3e} FLOPs an image forward (the paper: 8.2e9), "
        f"{total:.3e} for {EPOCHS} epochs of training (3.2e18).\n"
    )
    print(table(recorded))


if __name__ == "__main__":
    main()
