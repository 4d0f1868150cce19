"""Bytes of a sparse ResNet-50 in a file, and the time to save and load it.

    python -m benchmarks.file_size

The parameters of `experiments.imagenet`'s ResNet-50 (25.6 M, float32 and bfloat16, batch norms
dense) with random ERK masks, saved by `dstee.save`. Beside it: dense, what gzip makes of dense,
the active values with a bit for each place, and the entropy of the masks with the values, below
which no lossless form of random masks can be. About 3 minutes on 2 CPU cores, for gzip.
"""

import gzip
import math
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dstee_jax as dstee
from experiments.training.models import ResNet50

SPARSITIES = (0.8, 0.9, 0.95, 0.98)


def sizes(params, masks, path):
    """Bytes by form, and seconds to save and load."""
    begin = time.perf_counter()
    dstee.save(path, params, masks)
    between = time.perf_counter()
    loaded = dstee.load(path)
    end = time.perf_counter()
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(loaded.params), strict=True)
    assert all(np.asarray(x).tobytes() == y.tobytes() for x, y in pairs)
    leaves = jax.tree.leaves(params)
    dense = sum(x.nbytes for x in leaves)
    shares = [(m.size, float(m.mean())) for m in jax.tree.leaves(masks)]
    kept = dense - sum(n * (1 - p) for n, p in shares) * leaves[0].itemsize
    entropy = sum(-n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) for n, p in shares if p < 1)
    data = b"".join(np.asarray(x).tobytes() for x in leaves)
    found = {
        "dense": dense,
        "gzip": len(gzip.compress(data, 6)),
        "dstee.save": os.path.getsize(path),
    }
    found |= {"bit mask": kept + sum(n for n, _ in shares) / 8, "entropy": kept + entropy / 8}
    return found, between - begin, end - between


def main():
    """Print the table."""
    build = lambda: ResNet50(1000, large=True, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
    rng = np.random.default_rng(0)  # biases, too, are not zero in a trained network
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    print(
        f"ResNet-50, {sum(x.size for x in jax.tree.leaves(params)):,} parameters, MB (10^6 bytes)\n"
    )
    names = ["dense", "gzip", "bit mask", "dstee.save", "entropy"]
    print(f"| type | sparsity | {' | '.join(names)} | save, s | load, s |")
    print("| --- |" + " --- |" * 8)
    with tempfile.TemporaryDirectory() as directory:
        for dtype in (jnp.float32, jnp.bfloat16):
            cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
            for sparsity in SPARSITIES:
                masks = dstee.init_masks(cast, sparsity, jax.random.key(0))
                sparse = dstee.apply_masks(cast, masks)
                found, saving, loading = sizes(sparse, masks, os.path.join(directory, "model"))
                row = " | ".join(f"{found[name] / 1e6:.2f}" for name in names)
                kind = jnp.dtype(dtype).name
                print(
                    f"| {kind} | {sparsity:.0%} | {row} | {saving:.1f} | {loading:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
