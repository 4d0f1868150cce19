"""Link prediction on a temporal graph: the paper's Tables 3 and 4.

    python -m experiments.linkpred --graph ia-enron-email-dynamic.edges --method dst_ee \\
        --sparsity 0.8 0.9 0.98 --seed 0 1 2

Temporal random walks (10 a node, at most 5 steps), skip-gram embeddings of dimension 8, and a
network of two fully connected layers (16-128-1) that tells edges from non-edges by the
embeddings of both ends. The latest 20% of the edges are the test set; walks see the training
edges alone (`--walk_all` walks the whole graph, test edges included, as the code that the
paper follows does). SGD with learning rate 0.05, batch 1024, 50 epochs (60 for `admm`, a third
each of dense training, ADMM and retraining), the best epoch by validation accuracy. Each run
appends a line to results/linkpred.jsonl, and

    python -m experiments.linkpred --table results/linkpred.jsonl

prints the tables. A graph of half a million edges takes about 20 s a run on 2 CPU cores.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import dstee_jax as dstee
from experiments.data import graphs, walks
from experiments.training import records
from experiments.training.arguments import Parser, choice, existing
from experiments.training.methods import METHODS, mask_steps, optimizer, segments
from experiments.training.progress import conclude, over

HIDDEN, DIMENSION, BATCH, LEARNING_RATE = 128, 8, 1024, 0.05
EPOCHS = {"admm": 60}  # 20 dense, 20 of ADMM, 20 of retraining; 50 for the others
NAMES = {"dense": "Dense", "admm": "Prune-from-dense", "dst_ee": "DST-EE"}
SPARSITIES = (0.8, 0.9, 0.98)
# Accuracy (%) at these, from the paper: Table 3 (wiki-talk), Table 4 (ia-email).
PAPER = {
    "wiki-talk": {
        "dense": ("79.72",) * 3,
        "admm": ("79.05", "78.34", "78.08"),
        "dst_ee": ("79.28", "79.13", "78.58"),
    },
    "ia-enron-email": {
        "dense": ("83.47",) * 3,
        "admm": ("83.19", "82.95", "67.18"),
        "dst_ee": ("83.77", "83.29", "82.82"),
    },
}


def init_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Two fully connected layers: 'layer_0/kernel' (16, 128) and 'layer_1/kernel' (128, 1)."""
    init = jax.nn.initializers.he_normal()
    keys = jax.random.split(key)
    shapes = [(2 * DIMENSION, HIDDEN), (HIDDEN, 1)]
    return {
        f"layer_{i}": {"kernel": init(k, shape), "bias": jnp.zeros(shape[1])}
        for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def logits(params: Any, embeddings: jax.Array, pairs: jax.Array) -> jax.Array:
    """Of pairs of nodes (n, 2): both ends' embeddings, side by side, through the network; (n,)."""
    x = embeddings[pairs].reshape(len(pairs), -1)
    x = jax.nn.relu(x @ params["layer_0"]["kernel"] + params["layer_0"]["bias"])
    return (x @ params["layer_1"]["kernel"] + params["layer_1"]["bias"])[:, 0]


def embed(graph: graphs.Graph, split: graphs.Split, seed: int, walk_all: bool) -> np.ndarray:
    """Embeddings of all nodes, scaled to a mean square of 1.

    From walks on the training edges, or on all. The scale is ours: skip-gram leaves any.
    """
    used = np.ones_like(split.walked) if walk_all else split.walked
    found = walks.temporal_walks(
        graph.src[used], graph.dst[used], graph.time[used], graph.nodes, seed=seed
    )
    table = walks.skip_gram(found, graph.nodes, dimension=DIMENSION, seed=seed)
    return table / np.sqrt(np.mean(table**2))


def train(
    method: str,
    sparsity: float,
    embeddings: np.ndarray,
    split: graphs.Split,
    seed: int,
    epochs: int,
    **options: Any,
) -> dict[str, Any]:
    """Train one network; accuracies in percent of each epoch, and of the best by validation."""
    key = jax.random.key(seed)
    steps = max(len(split.train) // BATCH, 1)
    batch = min(BATCH, len(split.train))
    tx = optimizer(
        method,
        optax.sgd(LEARNING_RATE),
        sparsity=sparsity,
        total_steps=steps * epochs,
        key=jax.random.fold_in(key, 1),
        distribution="uniform",
        **options,
    )
    params = init_params(jax.random.fold_in(key, 0))
    state = tx.init(params)
    params = dstee.apply_masks(params, state) if dstee.get_states(state) else params
    embeddings = jnp.asarray(embeddings)
    pairs = jnp.asarray(split.train)
    labels = jnp.arange(len(pairs)) < len(pairs) // 2

    def loss(params, index):
        score = logits(params, embeddings, pairs[index])
        return optax.sigmoid_binary_cross_entropy(score, labels[index]).mean()

    @functools.partial(jax.jit, static_argnames="mask_step")
    def ahead(params, state, order, begin, end, mask_step):
        """The steps from `begin` to `end` of an epoch; one program for any number."""

        def step(i, carry):
            params, state = carry
            grads = jax.grad(loss)(params, order[i])
            return dstee.apply(tx, grads, state, params, mask_step=mask_step)

        return jax.lax.fori_loop(begin, end, step, (params, state))

    @jax.jit
    def accuracy(params, pairs):
        wanted = jnp.arange(len(pairs)) < len(pairs) // 2
        return 100 * jnp.mean((logits(params, embeddings, pairs) > 0) == wanted)

    rng, best = np.random.default_rng(seed), None
    rounds = mask_steps(method, tx)
    for epoch in range(epochs):
        order = rng.permutation(len(pairs))[: steps * batch].reshape(steps, batch)
        for segment in segments(epoch * steps, steps, rounds):
            params, state = ahead(params, state, order, *segment)
        density = float(dstee.density(state)) if dstee.get_states(state) else 1.0
        found = float(accuracy(params, split.validation))
        # A network counts once it is as sparse as asked for.
        if density <= 1 - sparsity + 0.01 and (best is None or found > best[0]):
            best = found, density, params
    first, second = (best[2][f"layer_{i}"]["kernel"] != 0 for i in (0, 1))
    return {
        "accuracy": float(accuracy(best[2], split.test)),
        "validation_accuracy": best[0],
        "last_accuracy": float(accuracy(params, split.test)),
        "density": round(best[1], 4),
        # weights of the first layer whose hidden unit the second one reads
        "connected": [int(jnp.sum(first & second[:, 0])), int(jnp.sum(first))],
    }


def run(args: argparse.Namespace) -> None:
    """Every seed and sparsity of one method on one graph; appends a record for each."""
    console = Console(quiet=args.quiet)
    print_ = console.print
    graph = graphs.read(args.graph)
    print_(f"{args.graph.name}: {graphs.describe(graph)}")
    name = args.graph.name.removesuffix(".gz").rsplit(".", 1)[0]
    last: list[float] = []  # accuracies of the last cell
    cells = [(m, s) for m in args.method for s in ([0.0] if m == "dense" else args.sparsity)]
    for seed in args.seed:
        begin = time.perf_counter()
        split = graphs.split(graph, seed)
        embeddings = embed(graph, split, seed, args.walk_all)
        took = time.perf_counter() - begin
        print_(f"seed {seed}: {int(split.walked.sum()):,} training edges, embedded in {took:.0f} s")
        for method, sparsity in over(cells, f"seed {seed}", console):
            epochs = args.epochs or EPOCHS.get(method, 50)
            begin = time.perf_counter()
            options = {"every": args.every} if args.every else {}
            result = train(method, sparsity, embeddings, split, seed, epochs, **options)
            seconds = time.perf_counter() - begin
            print_(
                f"{method} at {sparsity:.0%}: test {result['accuracy']:.2f}%  validation "
                f"{result['validation_accuracy']:.2f}%  connected "
                f"{result['connected'][0]} of {result['connected'][1]}  ({seconds:.0f} s)"
            )
            record = {
                "graph": args.note or name,
                "nodes": graph.nodes,
                "edges": len(graph.src),
                "method": method,
                "sparsity": sparsity,
                "seed": seed,
                "epochs": epochs,
                "walks": "all edges" if args.walk_all else "training edges",
                **result,
                "seconds": round(seconds, 1),
                "embedding_seconds": round(took, 1),
            }
            records.append(args.results, record)
        last.append(result["accuracy"])
    what = f"{method} at {sparsity:.0%}: {records.mean_sd(last)}% right"
    conclude(console, what, record=args.results)


def table(runs: list[dict]) -> str:
    """The form of the paper's Tables 3 and 4: one table for each graph and kind of walk."""
    lines = []
    for (graph, walked), rows in records.group(runs, "graph", "walks").items():
        paper = next((t for name, t in PAPER.items() if name in graph), {})
        sparsities = sorted({r["sparsity"] for r in rows if r["method"] != "dense"}) or [0.0]
        cells = records.group(rows, "method", "sparsity")
        seeds = sorted({len(cell) for cell in cells.values()})
        lines.append(
            f"{graph}: {rows[0]['nodes']:,} nodes, {rows[0]['edges']:,} edges; walks on {walked}; "
            f"test accuracy (%) of the best validation epoch, {'/'.join(map(str, seeds))} seeds"
            + ("; paper: the full graph, walks on all edges" if paper else "")
            + "\n"
        )
        means = {k: np.mean([r["accuracy"] for r in cell]) for k, cell in cells.items()}
        head = " | ".join(f"{s:.0%}" + (f" | paper {s:.0%}" if paper else "") for s in sparsities)
        columns = len(sparsities) * (2 if paper else 1)
        lines.append(f"| method | epochs | {head} |")
        lines.append("| --- | --- |" + " --- |" * columns)
        for method in dict.fromkeys(r["method"] for r in rows):
            row = []
            for s in sparsities:
                cell = cells.get((method, 0.0 if method == "dense" else s), [])
                text = records.mean_sd(r["accuracy"] for r in cell) if cell else ""
                rivals = [v for (m, at), v in means.items() if at == s and m != "dense"]
                if method != "dense" and cell and means[method, s] == max(rivals):
                    text = f"**{text}**"
                row.append(text)
                published = dict(zip(SPARSITIES, paper.get(method, ()), strict=False))
                row += [published.get(s, "")] if paper else []
            epochs = next(r["epochs"] for r in rows if r["method"] == method)
            lines.append(f"| {NAMES.get(method, method)} | {epochs} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = Parser(__doc__)
    add = parser.add_argument
    masked = [
        name for name, m in METHODS.items() if not (m.first_masks or m.reparameterised or m.pruned)
    ]
    add("--graph", type=Path, help="edge list: src dst time, or src dst weight time; gzip or not")
    add("--method", type=choice(masked), nargs="+", default=["dst_ee"], help=", ".join(masked))
    add("--sparsity", type=float, nargs="+", default=[*SPARSITIES])
    add("--seed", type=int, nargs="+", default=[0])
    add("--epochs", type=int, help="50 by default, 60 for admm")
    add("--every", type=int, help="steps between mask updates")
    add("--walk_all", action="store_true", help="walk test edges too, as the original code does")
    add("--note", help="the graph's name in records, instead of the file's")
    add("--results", type=Path, default=records.RESULTS / "linkpred.jsonl")
    add("--table", type=existing, help="print the tables of a file of records, and leave")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    if not args.table and not args.graph:
        parser.error("pass --graph FILE to train, or --table FILE to print the tables.")
    if wrong := [s for s in args.sparsity if not 0 <= s < 1]:
        parser.error(f"--sparsity {wrong[0]} must be in [0, 1), as 0.98 for 2% of the weights.")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    if args.table:
        print(table(records.read(args.table)))
        return
    try:
        run(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
