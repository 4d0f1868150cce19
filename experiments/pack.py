"""The network of a run as one small file: parameters, masks and batch statistics.

    python -m experiments.pack RUN model.safetensors

RUN is the `--work_dir` of a run of `experiments.cifar`, `imagenet`, `mlp` or `lm`; its last
checkpoint is taken (of a run by STE that was stopped, at the sparsity of its end).
`python -m dstee_jax show model.safetensors` shows what is in the file, and

    params, masks, metadata = dstee.load("model.safetensors", like=nnx.state(model))

puts it into the network (`experiments.training.models`; for `lm`, `training.transformer`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dstee_jax as dstee
from dstee_jax import soft_threshold
from experiments.training import reparameterised
from experiments.training.arguments import Parser
from experiments.training.checkpoints import Checkpoints, by_name
from experiments.training.methods import METHODS, reparameterisation

Arrays = dict[str, np.ndarray]


def sparse_state(opt_state: Any) -> dict[str, Any]:
    """The restored `SparseState` in an optimizer state; empty for a dense one's."""
    if isinstance(opt_state, dict) and {"masks", "counters"} <= opt_state.keys():
        return opt_state
    below = opt_state.values() if isinstance(opt_state, dict) else opt_state
    inside = isinstance(opt_state, dict | list | tuple)
    found = [sparse_state(node) for node in below] if inside else []
    return next((state for state in found if state), {})


def whole(rectangle: np.ndarray, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The dense kernel of a rectangle of active tiles, whose mask has an entry for each tile."""
    columns, depth, outputs = rectangle.shape[-3:]
    tile = (depth // index.shape[-1], outputs)
    shape = (mask.shape[-2] * tile[0], columns * outputs)
    return np.asarray(dstee.Tiles(index, tile, shape).dense(rectangle))


def nested(values: dict[str, Any], *, numbers: bool = False) -> dict[Any, Any]:
    """Values by name as a tree of dictionaries; with `numbers`, leaves are in the run's order."""
    tree: dict[Any, Any] = {}
    for name, value in values.items():
        *above, last = (int(k) if numbers and k.isdigit() else k for k in name.split("/"))
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def method_of(params: Any, settings: Mapping[str, Any]) -> str:
    """The method of a run; parameters behind thresholds show it without its settings."""
    thresholded = set(params) == set(soft_threshold.Thresholded._fields)
    return "str" if thresholded else settings.get("method", "dense")


def seen(params: Any, method: str, settings: Mapping[str, Any], step: Any) -> Arrays:
    """The parameters that the network sees, by name, of those that were trained."""
    if METHODS[method].reparameterised is None:
        return by_name(params)
    trained: Any = nested(by_name(params), numbers=True)
    if method == "str":
        weights, thresholds = map(by_name, (params["weights"], params["thresholds"]))
        thresholds = {name: thresholds.get(name, optax.MaskedNode()) for name in weights}
        trained = soft_threshold.Thresholded(weights, thresholds)
    options: Any = {name: settings.get(name) for name in ("sparsity", "distribution")}
    behind = reparameterisation(method, total_steps=1, **options)  # as sparse as at the end
    params, _ = behind.apply(trained, jnp.asarray(step))
    return by_name(jax.tree.map(lambda x: x + 0, params))  # -0.0 becomes 0.0


def network(
    state: Any, settings: Mapping[str, Any], seed: int | None = None
) -> tuple[Arrays, Arrays]:
    """Parameters with batch statistics, and masks, of a restored checkpoint, by name.

    Args:
      state: a `TrainState` as nested dictionaries, or the list that `experiments.lm` saves.
      settings: of the run; `method` says what the trained parameters are.
      seed: which of the seeds that were trained at once, by position.
    """
    if isinstance(state, list):
        state = {"params": state[0], "opt_state": state[2]}
    sparse = sparse_state(state["opt_state"])
    some = [state["params"], state.get("stats", {})]
    some += [sparse.get(name, {}) for name in ("masks", "indices")]
    if seed is not None:
        some = jax.tree.map(lambda x: x[seed], some)
    params, stats, masks, index = some[0], *map(by_name, some[1:])
    method = method_of(params, settings)
    arrays = seen(params, method, settings, state.get("step", 1))
    if not masks and METHODS[method].reparameterised is not None:
        masks = by_name(reparameterised.nonzero(nested(arrays)))
    for name, mask in masks.items():
        if name in index and arrays[name].ndim > mask.ndim:
            arrays[name] = whole(arrays[name], index[name], mask)
    return arrays | stats, masks


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="the --work_dir of a run")
    parser.add_argument("file", type=Path, help="to write")
    parser.add_argument("--seed", type=int, help="of the seeds that experiments.mlp trained")
    args = parser.parse_args(argv)
    if not (args.run / "checkpoints").is_dir():
        parser.error(f"{args.run} has no checkpoints in it: pass the --work_dir of a run.")
    config = args.run / "config.json"
    settings = json.loads(config.read_text()) if config.exists() else {}
    seeds = settings.get("seeds")
    seed = args.seed if args.seed is not None else (seeds or [None])[0]
    if seed is not None and seed not in (seeds or []):
        parser.error(f"--seed {seed} is not of the seeds of this run: {seeds}.")
    store = Checkpoints(args.run, keep=True)
    try:
        state = store.restore_plain()
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    arrays, masks = network(state, settings, None if seed is None else seeds.index(seed))
    described = {name: value for name, value in settings.items() if value is not None}
    metadata = {"settings": described | ({} if seed is None else {"seed": seed})}
    metadata |= {"checkpoint": store.latest()}
    dense = {name: optax.MaskedNode() for name in arrays}
    try:
        dstee.save(args.file, nested(arrays), nested(dense | masks), metadata)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    size = sum(x.nbytes for x in arrays.values())
    print(f"{args.file}: {os.path.getsize(args.file):,} bytes, of {size:,} when dense")


if __name__ == "__main__":
    main()
