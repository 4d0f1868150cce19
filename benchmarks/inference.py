"""Time of one sparse layer at inference on a CPU, in each form, of the best dense one.

    python -m benchmarks.inference                # about 5 minutes on 2 CPU cores
    python -m benchmarks.inference --widths 1024  # some of it
    python -m benchmarks.inference --least        # where other programs run: least times

Medians, all forms in turn, in one run, on a machine that does nothing else. Before a form is timed
come a pause, in which OpenBLAS's threads come to rest, and a call that is not timed. `NumPy` and
`JAX` are the dense layer's milliseconds, `x @ kernel`, in JAX jitted and with both on its device.
All other columns are the lesser of the two over the time of that form: above 1 it is faster than
dense. `csr`, `csc`, `threads` and `tiles` are forms of `dstee.inference`, `matmul` is the jitted
`dstee.matmul` on the same tiles; `chosen` is the form that `dstee.inference` took by its own
measurement, timed again beside the others.
"""

import argparse
import functools
import itertools
import time

import jax
import numpy as np
import optax
import scipy

import dstee_jax as dstee
from benchmarks.timing import medians

KEY = jax.random.key(0)
FORMS = ("csr", "csc", "threads", "tiles")
TILES = (None, (32, 32), (1, 32))
SPARSITIES = (0.8, 0.9, 0.95, 0.98)


def layer(width, tile, sparsity):
    """A square kernel, masked, and an optimizer's state with the mask, of weights or of tiles."""
    structure = {} if tile is None else {"structure": dstee.structures.tiles(tile)}
    tx = dstee.transform(
        optax.identity(), sparsity=sparsity, total_steps=1, every=None, key=KEY, **structure
    )
    params = {"kernel": jax.random.normal(KEY, (width, width)) / np.sqrt(width)}
    state = tx.init(params)
    return dstee.apply_masks(params, state), state


def products(params, state, batch):
    """The layer's thunk in each form, by name; and which form was chosen."""
    kernel = params["kernel"]
    on_device = jax.random.normal(jax.random.fold_in(KEY, batch), (batch, len(kernel)))
    x, matmul = np.asarray(on_device), jax.jit(dstee.matmul)
    in_tiles = dstee.get_state(state).masks["kernel"].shape != kernel.shape

    def of(**options):
        form = dstee.inference(params, state, batch, **options)["kernel"]
        return lambda: x @ form, getattr(form, "kind", "dense")

    thunks = {"NumPy": of(forms=["dense"])[0], "JAX": lambda: matmul(on_device, kernel)}
    thunks |= {name: of(forms=[name])[0] for name in (FORMS if in_tiles else FORMS[:-1])}
    if in_tiles:
        tiles = dstee.tiles(state, params)["kernel"]
        rectangle = dstee.to_tiles(kernel, tiles)
        thunks["matmul"] = lambda: matmul(on_device, rectangle, tiles)
    thunks["chosen"], chosen = of()
    return {name: rested(thunk) for name, thunk in thunks.items()}, chosen


def rested(thunk):
    """The thunk, with what `medians` does before each call."""

    def prepare():
        time.sleep(0.05)
        jax.block_until_ready(thunk())

    run = functools.partial(thunk)
    run.prepare = prepare
    return run


def row(width, tile, sparsity, batch, repeats, least) -> str:
    """One line of the table."""
    params, state = layer(width, tile, sparsity)
    thunks, chosen = products(params, state, batch)
    ms = medians(thunks, repeats, least)
    best = min(ms["NumPy"], ms["JAX"])
    dense = "".join(f"{ms[name]:8.3f}" for name in ("NumPy", "JAX"))
    names = (*FORMS, "matmul", "chosen")
    ratios = "".join(f"{best / ms[name]:8.2f}" if name in ms else 8 * " " for name in names)
    actual = 1 - float(dstee.density(state))
    what = "unstructured" if tile is None else f"{tile[0]} x {tile[1]}"
    return f"{width:5} {batch:5} {what:>13} {actual:8.1%}{dense}{ratios} {chosen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--repeats", type=int, default=9, help="of each form")
    parser.add_argument("--least", action="store_true", help="least times, if other programs run")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, scipy {scipy.__version__}, {jax.devices()[0]}")
    columns = "".join(f"{name:>8}" for name in ("NumPy", "JAX", *FORMS, "matmul", "chosen"))
    print(f"width batch {'tile':>13} sparsity{columns}")
    for width, batch, tile in itertools.product(args.widths, args.batches, TILES):
        for sparsity in args.sparsities:
            print(row(width, tile, sparsity, batch, args.repeats, args.least), flush=True)


if __name__ == "__main__":
    main()
