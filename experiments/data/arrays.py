"""Datasets of images of one size as two arrays, through TFDS without TensorFlow."""

from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]


def load(dataset: str, split: str, data_dir: str | Path) -> Arrays:
    """All images (n, height, width, channels) uint8 and labels (n,) int32 of a split.

    Raises:
      FileNotFoundError: `data_dir` does not hold the TFDS dataset in array_record form.
    """
    import tensorflow_datasets as tfds

    directory = Path(data_dir).expanduser()
    if not list(directory.glob(f"{dataset}/*/dataset_info.json")):
        raise FileNotFoundError(
            f"no {dataset} under {directory}. Make it with: "
            f"tfds build {dataset} --file_format=array_record --data_dir={data_dir} "
            "(needs TensorFlow, once), or pass the right --data_dir."
        )
    source = tfds.data_source(dataset, split=split, data_dir=str(directory))
    shape = source.dataset_info.features["image"].shape
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i, example in enumerate(source):
        images[i], labels[i] = example["image"], example["label"]
    return images, labels


def hold_out(arrays: Arrays, count: int) -> tuple[Arrays, Arrays]:
    """The arrays without their last `count` examples, and these.

    Raises:
      ValueError: nothing would be left to train on.
    """
    left = len(arrays[0]) - count
    if left < 1:
        raise ValueError(f"--validation {count} must be less than all {len(arrays[0])} images.")
    (images, held_out), (labels, held_out_labels) = (np.split(a, [left]) for a in arrays)
    return (images, labels), (held_out, held_out_labels)
