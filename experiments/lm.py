"""A language model whose layers are scanned: one leaf holds the weights of all layers.

    python -m experiments.lm --method dst_ee --sparsity 0.9 --seed 0 1 2

A decoder-only transformer (4 layers, width 128, 4 heads, windows of 128) reads bytes. The text
is Python's own documentation, which is on every machine (see `experiments.data.text`), or `--text
FILE ...`. Attention kernels have heads as an axis of their own and all kernels of the blocks
have the layers as their first: `stack_axes` of `dstee.transform` tells these from weights'
axes. Embeddings and head stay dense. AdamW with warm-up, cosine and clipping, a mask update
every 50 steps.

With `--tiles N` the weights of the blocks are active in tiles of N x N (`structures.tiles`), with
`--tiles 1 32` in tiles of 1 x 32, and on all steps but mask steps the kernels, their gradients and
moments are the active tiles alone (`dstee_jax.tiled_nnx`). Attention kernels then are matrices.
Each column of tiles of a kernel has as many active tiles, at least one: keep N small against the
width. At width 128 tiles of 32 leave 19% active where 10% are asked for; the record has the
density.

    python -m experiments.lm --width 512 --heads 8 --tiles 32

With `--work_dir DIR` the same command, started again, goes on from its last checkpoint there
(one at each evaluation), bit for bit.

Perplexity is exp of the mean negative log-likelihood of a byte (uniform: 256), over a whole
part of the text cut into windows side by side, every byte counted once; a byte is predicted
from the bytes before it in its window and one before that. Each run appends a line to
results/lm.jsonl (`--results` for another file), and

    python -m experiments.lm --table results/lm.jsonl

prints test perplexity by method and sparsity, lower is better. A run takes 3 to 7 minutes on a
CPU core; at 90% on seed 0: dense 5.8, DST-EE 7.2, a static mask 7.6 (docs/experiments.md).
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import dstee_jax as dstee
from dstee_jax.tiled_nnx import TileIndex, set_dense, set_tiles
from experiments.data import text as texts
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one, tile_of
from experiments.training.checkpoints import Checkpoints
from experiments.training.learner import (
    add_method_options,
    check_method_options,
    given_options,
)
from experiments.training.methods import mask_steps, measures, optimizer
from experiments.training.models import count_weights
from experiments.training.progress import Pace, conclude, over
from experiments.training.runs import check_same_command, record_once
from experiments.training.transformer import Transformer, in_blocks, stack_axes

# Methods that keep the count of every layer, as stacked layers ask for.
METHODS = ("dense", "static", "set", "set_itop", "mest", "rigl", "rigl_itop", "dst_ee")
State = tuple[Any, Any, Any]  # parameters, tiles, state of the optimizer


def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def perplexity(total_loss: Any, params: Any, part: np.ndarray, length: int, batch: int) -> float:
    """exp of the mean loss of a byte, each counted once.

    Args:
      total_loss: `(params, inputs, targets, counted)` to the sum of the counted losses.
      params: its parameters.
      part: bytes.
      length: of a window.
      batch: windows at a time.
    """
    cut = zip(*texts.windows(part, length, batch), strict=True)
    return math.exp(math.fsum(float(total_loss(params, *arrays)) for arrays in cut) / len(part))


class Trainer:
    """A network, its optimizer and the programs of a run of one seed.

    A state is (parameters, tiles, state of the optimizer); between steps kernels lie in their
    tiles, if `--tiles` asks for some.
    """

    def __init__(self, args: argparse.Namespace, seed: int = 0, **options: Any):
        """`options`: of the method, beside those of the command line."""
        self.args, self.key = args, jax.random.key(seed)
        shapes = nnx.eval_shape(self._model)
        self.graph, self.shapes, _ = nnx.split(shapes, nnx.Param, TileIndex)
        warmup = max(args.steps // 20, 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warmup, args.steps)
        self.tx = optimizer(
            args.method,
            optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=args.weight_decay)
            ),
            sparsity=args.sparsity,
            total_steps=args.steps,
            key=jax.random.fold_in(self.key, 1),
            where=in_blocks,
            stack_axes=stack_axes,
            tiles=args.tiles,
            **given_options(args) | options,
        )
        self.mask_steps = mask_steps(args.method, self.tx)
        self.dense_steps = dstee.dense_steps_of(self.tx) if args.tiles else ()

    def _model(self) -> Transformer:
        args = self.args
        return Transformer(
            *(args.layers, args.width, args.heads, args.length),
            tiled=args.tiles is not None,
            dtype=jnp.bfloat16 if args.bf16 else jnp.float32,
            rngs=nnx.Rngs(jax.random.fold_in(self.key, 0)),
        )

    def init(self) -> State:
        """The state before the first step, sparse already."""
        params, tiles = nnx.split(self._model(), nnx.Param, TileIndex)[1:]
        opt_state = jax.jit(self.tx.init)(params)
        if dstee.get_states(opt_state):
            params = dstee.rescale(params, opt_state) if self.args.rescale else params
            params = dstee.apply_masks(params, opt_state)
        if self.args.tiles:
            params, tiles = self._changed(set_tiles, params, tiles, opt_state)
        return params, tiles, opt_state

    def step(self, i: int, state: State, tokens: np.ndarray) -> tuple[State, jax.Array]:
        """Step `i`, from 1, on windows of bytes (batch, length + 1); the new state, the loss."""
        params, tiles, opt_state = self.dense(state) if i in self.dense_steps else state
        params, opt_state, loss = self._step(
            params, tiles, opt_state, tokens, mask_step=i in self.mask_steps
        )
        if i in self.dense_steps:
            params, tiles = self._changed(set_tiles, params, tiles, opt_state)
        return (params, tiles, opt_state), loss

    def perplexity(self, state: State, part: np.ndarray) -> float:
        """exp of the mean loss of a byte of `part`, each counted once."""
        args = self.args
        return perplexity(self.total_loss, state, part, args.length, args.batch)

    def dense(self, state: State) -> State:
        """The same with dense kernels."""
        params, tiles, opt_state = state
        return (*self._changed(set_dense, params, tiles), opt_state) if self.args.tiles else state

    def gradient(self, state: State, tokens: np.ndarray) -> Any:
        """Of the mean loss of a byte, with respect to the parameters in their form."""
        return self._gradient(*state[:2], tokens)[1]

    def _predict(self, params: Any, tiles: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(self.graph, params, tiles, copy=True)(inputs)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _changed(self, form: Callable, params: Any, tiles: Any, *opt_state: Any) -> Any:
        """Parameters and tiles after `set_tiles` or `set_dense`."""
        model = nnx.merge(self.graph, params, tiles)
        form(model, *opt_state)
        return nnx.split(model, nnx.Param, TileIndex)[1:]

    @functools.partial(
        jax.jit, static_argnums=0, static_argnames="mask_step", donate_argnums=(1, 3)
    )
    def _step(self, params: Any, tiles: Any, opt_state: Any, tokens: jax.Array, mask_step: bool):
        loss, grads = self._gradient(params, tiles, tokens)
        params, opt_state = dstee.apply(self.tx, grads, opt_state, params, mask_step=mask_step)
        return params, opt_state, loss

    @functools.partial(jax.jit, static_argnums=0)
    def _gradient(self, params: Any, tiles: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """The mean loss of a byte, and its gradient."""

        def loss_of(params):
            return losses(self._predict(params, tiles, tokens[:, :-1]), tokens[:, 1:]).mean()

        return jax.value_and_grad(loss_of)(params)

    @functools.partial(jax.jit, static_argnums=0)
    def total_loss(
        self, state: State, inputs: jax.Array, targets: jax.Array, counted: jax.Array
    ) -> jax.Array:
        """Sum of the losses of the bytes that count; all (windows, length)."""
        return jnp.sum(losses(self._predict(*state[:2], inputs), targets), where=counted)


def batches(args: argparse.Namespace, text: texts.Text, seed: int) -> Iterator[np.ndarray]:
    """Windows of a step at random places, int32 (batch, length + 1), for each step."""
    rng, window = np.random.default_rng(seed), np.arange(args.length + 1)
    for _ in range(args.steps):
        starts = rng.integers(0, len(text.train) - args.length, args.batch)
        yield text.train[starts[:, None] + window].astype(np.int32)


def settings(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What a record says of its run."""
    named = ("method", "sparsity", "tiles", "steps", "batch", "length", "layers", "width", "heads")
    named += ("learning_rate", "weight_decay", "rescale", "bf16")
    return {**{name: getattr(args, name) for name in named}, "seed": seed}


def checkpoints(args: argparse.Namespace, text: texts.Text, seed: int) -> Checkpoints | None:
    """Those of `--work_dir`, where only the same command goes on."""
    if not args.work_dir:
        return None
    own = settings(args, seed) | given_options(args) | {"text": texts.describe(text)["sha256"]}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    check_same_command(argparse.Namespace(work_dir=args.work_dir, **own), {"work_dir"})
    return Checkpoints(args.work_dir, keep=True)


def run(args: argparse.Namespace, text: texts.Text, seed: int = 0) -> dict[str, Any]:
    """Train one seed, evaluate now and then, and return the record."""
    console = Console(quiet=args.quiet)
    begin, print_ = time.perf_counter(), console.print
    trainer = Trainer(args, seed)
    state, history, first = trainer.init(), [], 0
    print_(f"{args.method}, seed {seed}: {count_weights(trainer.shapes):,} parameters")
    if (store := checkpoints(args, text, seed)) and (first := store.latest() or 0):
        state, notes = store.restore(state)
        dstee.check(trainer.tx, state[2], trainer.shapes)
        history, begin = notes["history"], begin - notes["seconds"]
    data = batches(args, text, seed)
    part, pace = max(args.steps // args.evaluations, 1), Pace()
    for i in over(range(1, args.steps + 1), f"{args.method}, seed {seed}", console):
        tokens = next(data)
        if i <= first:
            continue
        state, loss = trainer.step(i, state, tokens)
        if i % part == 0 or i == args.steps:
            if not np.isfinite(loss):  # waits for it
                raise FloatingPointError(
                    f"the loss is {loss} after step {i}: lower --learning_rate."
                )
            pace.stop(i)
            explored = float(measures(state[2])[1])
            found = trainer.perplexity(state, text.validation)
            history.append([i, round(found, 4), round(explored, 4)])
            seconds = time.perf_counter() - begin
            print_(
                f"step {i}/{args.steps}  loss {loss:.3f}  validation perplexity "
                f"{history[-1][1]:.3f}  R {explored:.3f}  {seconds:.0f} s"
            )
            if store:
                store.save(i, state, {"history": history, "seconds": seconds})
            pace.start(i)
    test = trainer.perplexity(state, text.test)
    print_(f"test perplexity {test:.3f}")
    if dstee.get_states(state[2]):
        print_(dstee.summary(state[2], trainer.shapes))
    return {
        **settings(args, seed),
        "data": args.note or ("files" if args.text else "Python's documentation"),
        "text": texts.describe(text),
        "options": given_options(args),
        "perplexity": round(test, 4),
        "validation_perplexity": history[-1][1],
        "density": round(float(measures(state[2])[0]), 6),
        "R": history[-1][2],
        "seconds": round(time.perf_counter() - begin, 1),
        "step_ms": pace.ms(part),
        "history": history,
    }


def table(runs: list[dict]) -> str:
    """A table for each text and setting: one row a method, one column a sparsity."""
    lines = []
    settings = ("layers", "width", "heads", "length", "batch", "steps", "learning_rate")
    settings += ("weight_decay", "rescale", "bf16", "tiles", "data")
    runs = [
        run | {"tiles": tuple(run.get("tiles") or ()), "sha256": run["text"]["sha256"]}
        for run in runs
    ]
    for (*setting, sha256), rows in records.group(runs, *settings, "sha256").items():
        sparsities = sorted({r["sparsity"] for r in rows if r["method"] != "dense"}) or [0.0]
        cells = records.group(rows, "method", "sparsity")
        seeds = sorted({len(cell) for cell in cells.values()})
        layers, width, *_ = setting
        rescaled = ", rescaled" if rows[0]["rescale"] else ""
        if rows[0]["tiles"]:
            rescaled += f", tiles of {' x '.join(map(str, rows[0]['tiles']))}"
        lines.append(
            f"{setting[-1]} ({sha256}), {layers} layers of width {width}{rescaled}, test "
            f"perplexity of a byte, {rows[0]['steps']} steps, {'/'.join(map(str, seeds))} seeds "
            "(R: exploration degree); lower is better\n"
        )
        lines.append("| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |")
        lines.append("| --- |" + " --- |" * len(sparsities))
        for method in METHODS:
            row = []
            for sparsity in sparsities:
                cell = cells.get((method, 0.0 if method == "dense" else sparsity), [])
                mean = records.mean_sd((r["perplexity"] for r in cell), 3) if cell else ""
                row.append(mean + _remarks(cell))
            if any(row):
                lines.append(f"| {method} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def _remarks(cell: list[dict]) -> str:
    """Exploration degree, and the density where tiles or so made it another than was asked for."""
    if not cell or cell[0]["method"] == "dense":
        return ""
    explored, density = (statistics.mean(r[name] for r in cell) for name in ("R", "density"))
    other = abs(1 - cell[0]["sparsity"] - density) > 0.005
    return f" (R {explored:.3f}" + (f", {density:.1%} active)" if other else ")")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with what to pass instead."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", help="files to train on, instead of Python's documentation")
    add("--seed", type=int, nargs="+", default=[0], help="one run each, one after the other")
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=8, help="windows of a step")
    add("--length", type=int, default=128, help="bytes of a window")
    add("--evaluations", type=at_least_one, default=5, help="on validation text, over the training")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--learning_rate", type=float, default=5e-3)
    add("--weight_decay", type=float, default=0.01)
    add_method_options(parser)
    parser.set_defaults(sparsity=0.9, every=50)
    add("--tiles", type=at_least_one, nargs="+", help="of active weights: N for N x N, or two")
    add("--work_dir", type=Path, help="of checkpoints: the same command again goes on from there")
    add("--note", help="what the record says of the text, as 'War and Peace'")
    add("--results", type=Path, default=records.RESULTS / "lm.jsonl")
    add("--table", type=Path, help="print the table of a file of records, and leave")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    for name, least in {"steps": 2, "batch": 1, "length": 1, "layers": 1, "heads": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be {least} or more.")
    if args.width < 1 or args.width % args.heads:
        parser.error(f"--width {args.width} must be a multiple of --heads {args.heads}.")
    args.tiles = tile_of(parser, args.tiles)
    if any(args.width % size for size in args.tiles or ()):
        parser.error(f"--width {args.width} must be a multiple of --tiles {args.tiles}.")
    if args.tiles and args.method == "dense":
        parser.error("--method dense has no masks: leave --tiles out, or pass another method.")
    if args.work_dir and len(args.seed) > 1:
        parser.error("--work_dir holds one run: pass one --seed.")
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity} must be in [0, 1), as 0.9 for 10% of weights.")
    if args.method not in METHODS:
        parser.error(
            f"--method {args.method} does not keep the count of every layer, chooses masks from "
            f"images, or trains other weights than the network's: pass one of {', '.join(METHODS)}."
        )
    if args.sparse_allreduce:
        parser.error("--sparse_allreduce is not for this one-device experiment: leave it out.")
    if args.structure:
        parser.error(f"--structure {args.structure} is not for stacked layers: leave it out.")
    if args.distribution == "uniform_first_dense":
        parser.error("--distribution uniform_first_dense is for images: pass erk or uniform.")
    check_method_options(parser, args)
    if args.method == "dense":
        args.sparsity = 0.0
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    try:
        if args.table:
            print(table(records.read(args.table)))
            return
        text = texts.load(args.text, args.length)
        runs = []
        for seed in args.seed:
            runs.append(run(args, text, seed))
            record_once(args, runs[-1])
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    found = records.mean_sd((run["perplexity"] for run in runs), 3)
    what = f"{args.method} at {args.sparsity:.0%}: test perplexity {found}"
    conclude(Console(quiet=args.quiet), what, record=args.results, checkpoints=args.work_dir)


if __name__ == "__main__":
    main()
