"""Sparse training on scikit-learn's handwritten digits: every method, five seeds at once.

    python -m experiments.quickstart

About two minutes on 2 CPU cores. Prints a table (test accuracy in percent, mean ± standard
deviation over the seeds) and the path of a picture. `--methods all` runs every method;
`--record` appends the runs to results/digits.jsonl. The network is an MLP 64-256-128-10; 60% of
the 1,797 images train, 20% are for validation (`--split validation`), 20% for the test.
"""

import functools
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dstee_jax as dstee
from experiments.training import records, sis
from experiments.training.arguments import Parser, at_least_one, choice
from experiments.training.methods import (
    METHODS,
    first_masks,
    mask_steps,
    measures,
    optimizer,
    reparameterisation,
    segments,
)
from experiments.training.progress import bar, conclude

WIDTHS = (64, 256, 128, 10)
BATCH = 64
STEPS = 2000
EVAL_EVERY = 50
SCORED = 100  # images that SNIP and GraSP see: 10 of each class
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
# The schedule of mask updates that won on the validation split at 98%
# (experiments/studies/sweep.py), the same for every method.
SCHEDULE = {"every": 50, "drop_fraction": 0.5, "stop": 0.9}
# STR's sparsity comes out of training: the weight decay that ends near each sparsity here.
THRESHOLD_DECAY = {0.9: 5.7e-3, 0.95: 8e-3, 0.98: 1.35e-2}


class Result(NamedTuple):
    """What one method did at one sparsity; the leading axis of every array is the seed."""

    accuracy: np.ndarray  # (seeds, evaluations), percent
    exploration: np.ndarray  # (seeds, evaluations), R in [0, 1]
    density: np.ndarray  # (seeds,)
    masks: list[np.ndarray]  # the first layer's mask of the first seed, early and late
    seconds: float


def load(split: str) -> tuple[jax.Array, ...]:
    """Train images and labels, and those of 'validation' or 'test'; (n, 64) in [-1, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32)
    rest, train, rest_labels, train_labels = train_test_split(
        images, labels, test_size=0.6, random_state=0, stratify=labels
    )
    halves = train_test_split(
        rest, rest_labels, test_size=0.5, random_state=0, stratify=rest_labels
    )
    x, y = (halves[0], halves[2]) if split == "validation" else (halves[1], halves[3])
    return jnp.array(train), jnp.array(train_labels), jnp.array(x), jnp.array(y)


def init_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """He-initialised weights; path 'layer_0/kernel' and so on."""
    init = jax.nn.initializers.he_normal()
    layers = list(itertools.pairwise(WIDTHS))
    return {
        f"layer_{i}": {
            "kernel": init(jax.random.fold_in(key, i), shape),
            "bias": jnp.zeros(shape[1]),
        }
        for i, shape in enumerate(layers)
    }


def forward(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Logits (n, 10) of images (n, 64)."""
    for i in range(len(WIDTHS) - 1):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def train(
    method: str,
    sparsity: float,
    seeds: int,
    split: str = "test",
    steps: int | None = None,
    rescale: bool = False,
    tick: Any = lambda: None,
    **options: Any,
) -> Result:
    """Train all seeds of one method at once with `vmap`; seed s has the same data for all."""
    started = time.perf_counter()
    steps = STEPS if steps is None else steps
    x_train, y_train, x_eval, y_eval = load(split)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    factory, _, chosen, reparameterised, pruned = METHODS[method]
    decay = WEIGHT_DECAY if method != "str" else options["threshold_decay"]
    named = options.get("distribution")
    behind = reparameterisation(method, sparsity=sparsity, total_steps=steps, distribution=named)
    inner = optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )

    def make(key, masks=None):
        return optimizer(
            method, inner, sparsity=sparsity, total_steps=steps, key=key, masks=masks, **options
        )

    def tx_of(key, opt_state):
        """The optimizer whose state this is: its masks are given where they were chosen."""
        if not dstee.get_states(opt_state):
            return inner
        given = chosen or pruned
        return make(key, dstee.get_state(opt_state).masks if given else None)

    def init(key):
        params = init_params(jax.random.fold_in(key, 0))
        params = behind.init(params)
        if factory is None or pruned:
            return params, inner.init(params)
        some = jax.random.permutation(jax.random.fold_in(key, 2), len(x_train))[:SCORED]
        batch = (x_train[some], y_train[some])
        masks = first_masks(
            method, params, batch, sparsity, key, network=lambda p, x, training: forward(p, x)
        )
        opt_state = make(jax.random.fold_in(key, 1), masks).init(params)
        masks = dstee.get_state(opt_state).masks
        params = dstee.rescale(params, masks) if rescale else params
        return dstee.apply_masks(params, masks), opt_state

    def prune(params, opt_state, key):
        params, masks = sis.sparsify_mlp(params, x_train, sparsity)
        state = make(key, masks).init(params)
        explored = jax.tree.map(jnp.ones_like, state.counters)  # all weights were active
        return params, state._replace(counters=explored, inner_state=opt_state)

    def loss(trained, t, x, y):
        params, penalty = behind.apply(trained, t)
        logits = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean() + penalty

    def ahead(params, opt_state, begin, end, key, mask_step):
        """The steps from `begin` to `end`, all of one kind."""

        def step(t, carry):
            params, opt_state = carry
            index = jax.random.randint(jax.random.fold_in(key, t), (BATCH,), 0, len(x_train))
            grads = jax.grad(loss)(params, t, x_train[index], y_train[index])
            tx = tx_of(key, opt_state)
            return dstee.apply(tx, grads, opt_state, params, mask_step=mask_step)

        return jax.lax.fori_loop(begin, end, step, (params, opt_state))

    def evaluate(trained, opt_state, t):
        params, _ = behind.apply(trained, t)
        hits = forward(params, x_eval).argmax(-1) == y_eval
        density, explored = measures(opt_state, params if reparameterised else None)
        return 100 * hits.mean(), explored, density

    def over_seeds(opt_state):
        """`ahead` and `evaluate` of all seeds at once.

        The step counters stay unbatched, so that the mask update stays a loop of no or one round.
        """
        axes = dstee.seed_axes(opt_state)

        @functools.partial(jax.jit, static_argnames="mask_step", donate_argnums=(0, 1))
        def all_ahead(params, opt_state, begin, end, keys, mask_step):
            one = functools.partial(ahead, mask_step=mask_step)
            mapped = jax.vmap(one, in_axes=(0, axes, None, None, 0), out_axes=(0, axes))
            return mapped(params, opt_state, begin, end, keys)

        return all_ahead, jax.jit(jax.vmap(evaluate, in_axes=(0, axes, None)))

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    axes = dstee.seed_axes(jax.eval_shape(init, keys[0])[1])
    params, opt_state = jax.jit(jax.vmap(init, out_axes=(0, axes)))(keys)
    all_ahead, evaluate_all = over_seeds(opt_state)
    rounds = mask_steps(method, make(jax.random.key(0)))
    first_mask = _first_mask(opt_state)
    curves = []
    for first in range(0, steps, EVAL_EVERY):
        if pruned and first >= sis.PRUNE_AT * steps > first - EVAL_EVERY:
            one = jax.tree.map(lambda x: x[0], (params, opt_state))
            axes = dstee.seed_axes(jax.eval_shape(prune, *one, keys[0])[1])
            pruned = jax.vmap(prune, in_axes=(0, 0, 0), out_axes=(0, axes))
            params, opt_state = jax.jit(pruned)(params, opt_state, keys)
            all_ahead, evaluate_all = over_seeds(opt_state)
        for begin, end, mask_step in segments(first, EVAL_EVERY, rounds):
            params, opt_state = all_ahead(
                params, opt_state, first + begin, first + end, keys, mask_step=mask_step
            )
        curves.append(jax.device_get(evaluate_all(params, opt_state, first + EVAL_EVERY)))
        tick()
    accuracy, explored, density = (np.stack(c, axis=1) for c in zip(*curves, strict=True))
    masks = [first_mask, _first_mask(opt_state)]
    return Result(accuracy, explored, density[:, -1], masks, time.perf_counter() - started)


def _first_mask(opt_state: Any) -> np.ndarray:
    """The first layer's mask of the first seed, ones without masks."""
    states = dstee.get_states(opt_state)
    return np.asarray(states[0].masks["layer_0"]["kernel"][0]) if states else np.ones(WIDTHS[:2])


def _nearest(table: dict[float, float], sparsity: float) -> float:
    return table[min(table, key=lambda known: abs(known - sparsity))]


def picture(results: dict[tuple[str, float], Result], path: Path) -> None:
    """Accuracy and exploration over training, and the first layer's mask early and late."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    named = {
        "dense": "#444444",
        "static": "#999999",
        "set": "#E69F00",
        "rigl": "#0072B2",
        "dst_ee": "#D55E00",
    }
    others = iter(plt.colormaps["tab20"].colors * 2)
    colors = {method: named.get(method) or next(others) for method in METHODS}
    hardest = max(sparsity for _, sparsity in results)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (method, sparsity), result in results.items():
        if sparsity not in (0.0, hardest):
            continue
        at = EVAL_EVERY * (1 + np.arange(result.accuracy.shape[1]))
        mean, sd = result.accuracy.mean(0), result.accuracy.std(0)
        axes[0, 0].plot(at, mean, color=colors[method], label=method)
        axes[0, 0].fill_between(at, mean - sd, mean + sd, color=colors[method], alpha=0.15, lw=0)
        if method != "dense":
            axes[0, 1].plot(at, result.exploration.mean(0), color=colors[method], label=method)
    low = min(r.accuracy[:, -1].mean() for r in results.values())
    axes[0, 0].set(xlabel="step", ylabel="test accuracy (%)", ylim=(low - 8, 100))
    axes[0, 0].set_title(f"accuracy at {hardest:.0%} sparsity (band: 1 sd)")
    axes[0, 1].set(xlabel="step", ylabel="exploration degree R", title="weights ever active")
    for axis in axes[0]:
        axis.legend(frameon=False, ncols=1 + len(axis.lines) // 6, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    masks = results.get(("dst_ee", hardest), next(reversed(results.values()))).masks
    for axis, mask, when in zip(axes[1], masks, ("before", "after"), strict=True):
        # Inputs are pixels of an 8 by 8 image: draw how many hidden units read each.
        image = axis.imshow(
            mask.sum(1).reshape(8, 8), cmap="cividis", vmin=0, vmax=masks[-1].sum(1).max()
        )
        axis.set(title=f"first layer {when} training: connections per pixel", xticks=[], yticks=[])
        figure.colorbar(image, ax=axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    quick = ["dense", "static", "set", "rigl", "dst_ee"]
    valid = [*METHODS, "all"]
    parser.add_argument("--methods", nargs="+", type=choice(valid), default=quick)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.95, 0.98])
    parser.add_argument("--seeds", type=at_least_one, default=5)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--picture", type=Path, default=Path("runs/quickstart.png"))
    parser.add_argument("--rescale", action="store_true", help="sparse-aware initial scale")
    parser.add_argument("--record", action="store_true", help="append the runs to --results")
    parser.add_argument("--results", type=Path, default=records.RESULTS / "digits.jsonl")
    args = parser.parse_args(argv)
    if wrong := [s for s in args.sparsity if not 0 <= s < 1]:
        parser.error(f"--sparsity {wrong[0]} must be in [0, 1), as 0.95 for 5% of the weights.")

    if "all" in args.methods:
        args.methods = [*METHODS]
    cells = [(m, s) for m in args.methods if m != "dense" for s in args.sparsity]
    cells = [("dense", 0.0)] * ("dense" in args.methods) + cells
    results = {}
    console = Console()
    with bar(console) as progress:
        task = progress.add_task("", total=len(cells) * STEPS // EVAL_EVERY)
        for method, sparsity in cells:
            progress.update(task, description=f"{method} at {sparsity:.0%}")
            tick = lambda: progress.advance(task)  # noqa: E731
            results[method, sparsity] = train(
                method,
                sparsity,
                args.seeds,
                args.split,
                rescale=args.rescale,
                tick=tick,
                threshold_decay=_nearest(THRESHOLD_DECAY, sparsity),
                **SCHEDULE,
            )

    table = Table(title=f"digits, {args.split} accuracy (%), {args.seeds} seeds")
    for column in ("method", "sparsity", "accuracy", "density", "R", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for (method, sparsity), result in results.items():
        accuracy, explored = (
            records.mean_sd(result.accuracy[:, -1]),
            result.exploration[:, -1].mean(),
        )
        table.add_row(
            method,
            f"{sparsity:.0%}",
            accuracy,
            f"{result.density.mean():.4f}",
            f"{explored:.3f}",
            f"{result.seconds:.1f}",
        )
        for seed in range(args.seeds if args.record else 0):
            record = {
                "data": "digits",
                "split": args.split,
                "model": "mlp",
                "method": method,
                "sparsity": sparsity,
                "seed": seed,
                "steps": STEPS,
                "rescale": args.rescale,
                "accuracy": float(result.accuracy[seed, -1]),
                "best_accuracy": float(result.accuracy[seed].max()),
                "density": float(result.density[seed]),
                "R": float(result.exploration[seed, -1]),
                "seconds": round(result.seconds, 1),
            }
            records.append(args.results, record)
    console.print(table)
    picture(results, args.picture)
    method, sparsity = [*results][-1]
    accuracy = records.mean_sd(results[method, sparsity].accuracy[:, -1])
    what = f"{method} at {sparsity:.0%}: {accuracy}% of the {args.split} images right"
    conclude(console, what, record=args.results if args.record else None, picture=args.picture)


if __name__ == "__main__":
    main()
