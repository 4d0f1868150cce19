"""ImageNet's input: images per second of one core, by step, and with worker processes.

    python -m benchmarks.imagenet_input --data_dir DIR

Decodes and crops real JPEGs in one thread (median over several passes), then reads whole batches
with 0, 1 and 2 worker processes. What the devices could do without input says
`python -m experiments.imagenet --fake_data --steps 20 --work_dir RUN`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from experiments.data import imagenet as images


def per_second(work: Callable[[Any], Any], examples: list[Any], passes: int = 5) -> float:
    """Median images per second over some passes."""
    speeds = []
    for _ in range(passes):
        begin = time.perf_counter()
        for example in examples:
            work(example)
        speeds.append(len(examples) / (time.perf_counter() - begin))
    return statistics.median(speeds)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)
    try:
        source = images.source("train", args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    cv2.setNumThreads(1)
    encoded = [source[i]["image"] for i in range(min(len(source), 192))]
    decoded = [images.decode(e) for e in encoded]
    rng = np.random.default_rng(0)
    megapixels = statistics.mean(d.shape[0] * d.shape[1] for d in decoded) / 1e6
    print(f"{len(encoded)} JPEGs, {megapixels:.2f} megapixels, to {args.image_size} pixels")
    rows = {
        "decode": (images.decode, encoded),
        "random crop and resize": (
            lambda d: images.random_resized_crop(d, rng, args.image_size),
            decoded,
        ),
        "decode, random crop, resize": (
            lambda e: images.random_resized_crop(images.decode(e), rng, args.image_size),
            encoded,
        ),
        "decode, centre crop, resize": (
            lambda e: images.centre_crop(images.decode(e), args.image_size),
            encoded,
        ),
    }
    for name, (work, examples) in rows.items():
        print(f"{name:<32}{per_second(work, examples):8.0f} images/s on one core")
    for workers in (0, 1, 2):
        batches = images.train_batches(
            source, batch=args.batch, size=args.image_size, seed=0, workers=workers
        )
        for _ in range(workers + 1):  # until the workers are up
            next(batches)
        begin, count = time.perf_counter(), 12
        for _ in range(count):
            next(batches)
        speed = count * args.batch / (time.perf_counter() - begin)
        batches.close()
        name = f"batches, {workers} workers" if workers else "batches, threads"
        print(f"{name:<32}{speed:8.0f} images/s")


if __name__ == "__main__":
    main()
