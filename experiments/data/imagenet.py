"""ImageNet batches through TFDS and Grain: decode, crop and flip in worker processes.

A batch is the same whatever the number of processes and workers: the crop of an image depends
on the seed and its place in the run alone, and each process reads its own part of each batch.
"""

import signal
from pathlib import Path
from typing import Any, Literal

import cv2
import grain
import numpy as np

Example = dict[str, Any]
Batch = dict[str, np.ndarray]  # 'image' (n, size, size, 3) uint8, 'label' (n,) int32

CENTRE = 224 / 256  # share of the shorter side that the evaluation's crop keeps


def source(split: Literal["train", "validation"], data_dir: str | Path) -> Any:
    """Random access to encoded images and labels of `imagenet2012`.

    Raises:
      FileNotFoundError: `data_dir` does not hold the dataset in array_record form.
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir).expanduser()
    if not list(directory.glob("imagenet2012/*/dataset_info.json")):
        raise FileNotFoundError(
            f"no imagenet2012 under {directory}. Make it with: tfds build imagenet2012 "
            f"--file_format=array_record --data_dir={data_dir} (needs TensorFlow and the "
            "original archives, once), or pass the right --data_dir."
        )
    encoded = {"image": tfds.decode.SkipDecoding()}
    return tfds.data_source("imagenet2012", split=split, data_dir=str(directory), decoders=encoded)


def decode(encoded: bytes) -> np.ndarray:
    """An RGB image (h, w, 3) uint8 from its JPEG or PNG bytes.

    Raises:
      ValueError: the bytes are no image.
    """
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{len(encoded)} bytes that are no JPEG or PNG image: {encoded[:8]!r}...")
    return image[..., ::-1]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """To (size, size, 3), averaging where it shrinks."""
    shrinks = min(image.shape[:2]) > size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=method)


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, smallest: float = 0.08
) -> np.ndarray:
    """A random box of `smallest` to 1 of the area and 3/4 to 4/3 in shape, resized.

    After ten boxes that do not fit: the largest central square.

    References:
      Szegedy et al., "Going Deeper with Convolutions", 2015, Section 6.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(smallest, 1) * height * width
        shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return resize(image[top : top + h, left : left + w], size)
    return centre_crop(image, size, keep=1.0)


def centre_crop(image: np.ndarray, size: int, keep: float = CENTRE) -> np.ndarray:
    """The central square of `keep` times the shorter side, resized."""
    height, width = image.shape[:2]
    side = max(round(keep * min(height, width)), 1)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


class _Augmented(grain.transforms.RandomMap):
    """Decode, crop at random, flip at random."""

    def __init__(self, size: int):
        self.size = size

    def random_map(self, example: Example, rng: np.random.Generator) -> Batch:
        image = random_resized_crop(decode(example["image"]), rng, self.size)
        image = image[:, ::-1] if rng.integers(2) else image
        return {"image": image, "label": np.int32(example["label"])}


class _Centred(grain.transforms.Map):
    """Decode and crop the centre; padding has the label -1."""

    def __init__(self, size: int):
        self.size = size

    def map(self, example: Example) -> Batch:
        if not example:
            blank = np.zeros((self.size, self.size, 3), np.uint8)
            return {"image": blank, "label": np.int32(-1)}
        image = centre_crop(decode(example["image"]), self.size)
        return {"image": image, "label": np.int32(example["label"])}


class _Padded:
    """A source with empty examples after its end, up to a multiple of `batch`."""

    def __init__(self, examples: Any, batch: int):
        self.examples, self.size = examples, -(-len(examples) // batch) * batch

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        return self.examples[index] if index < len(self.examples) else {}


def train_batches(
    examples: Any,
    *,
    batch: int,
    size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """This process's part of endless shuffled batches; its `get_state` goes in a checkpoint.

    Args:
      examples: from `source`.
      batch: of all processes together; a multiple of `processes`.
      size: of the images, in pixels.
      seed: of order, crops and flips.
      process, processes: which part is read here.
      workers: processes that decode; 0 for threads of this one.
    """
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    dataset = dataset.random_map(_Augmented(size)).batch(batch // processes)
    return iter(_prefetched(dataset[process::processes], workers))


def validation_batches(
    examples: Any, *, batch: int, size: int, process: int = 0, processes: int = 1, workers: int = 0
) -> grain.DatasetIterator:
    """This process's part of all examples, each once; the last batch is filled with label -1."""
    dataset = grain.MapDataset.source(_Padded(examples, batch)).map(_Centred(size))
    return iter(_prefetched(dataset.batch(batch // processes)[process::processes], workers))


def _prefetched(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = dataset.to_iter_dataset(threads)
    if not workers:
        return batches
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain hands them to its workers
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    return batches.mp_prefetch(options, _ignore_sigterm)


def _ignore_sigterm(worker: int, workers: int) -> None:
    """A scheduler's SIGTERM reaches the whole process group: the run still needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
