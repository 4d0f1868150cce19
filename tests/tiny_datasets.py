"""Tiny datasets in the format of the real ones: TFDS directories of array_record files."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

# Marks of tests that run experiments: programs are compiled quickly; the warnings are raised inside
# tensorflow-datasets, grain and orbax, by their own dependencies.
MARKS = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    file.seek(0)
    return file


def write(directory, name, version, features, splits):
    """A TFDS dataset in array_record form, made without TensorFlow."""
    import tensorflow_datasets as tfds

    path = directory / name / version
    path.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(path), module_name=__name__
    )
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features)),
        max_examples_per_shard=1000,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    writer.initialize_splits(list(splits))
    for split, examples in splits.items():
        writer.add_examples({split: examples})
    writer.close_all()


def write_cifar(directory, name, classes, sizes):
    """Random images, PNG."""
    rng = np.random.default_rng(0)
    splits = {s: rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8) for s, n in sizes.items()}
    write_images(directory, name, "3.0.2", classes, splits)


def write_mnist(directory, sizes):
    """Images whose label can be seen, PNG: four rows of 28 by 28 random pixels are the brighter."""
    rng = np.random.default_rng(0)
    splits = {s: rng.integers(0, 150, (n, 28, 28, 1), dtype=np.uint8) for s, n in sizes.items()}
    for images in splits.values():
        for i, image in enumerate(images):
            image[2 * (i % 10) : 2 * (i % 10) + 4] += 100
    write_images(directory, "mnist", "3.0.1", 10, splits)


def write_images(directory, name, version, classes, splits):
    """Images (n, height, width, channels) as PNG; labels 0, 1, ..., classes - 1, 0, ..."""
    import tensorflow_datasets as tfds

    examples = {
        split: [{"image": encoded(x.squeeze()), "label": i % classes} for i, x in enumerate(images)]
        for split, images in splits.items()
    }
    features = {
        "image": tfds.features.Image(shape=next(iter(splits.values())).shape[1:]),
        "label": tfds.features.ClassLabel(num_classes=classes),
    }
    write(directory, name, version, features, examples)


def write_imagenet(directory, sizes):
    """Pieces of two photographs in many sizes, JPEG; labels 0, 7, 14, ... below 1000."""
    import tensorflow_datasets as tfds

    photos, rng = load_sample_images().images, np.random.default_rng(0)

    def example(i):
        height, width = rng.integers(40, 120, 2)
        top, left = rng.integers(300), rng.integers(500)
        piece = photos[i % 2][top : top + height, left : left + width]
        return {
            "file_name": f"{i}.JPEG",
            "image": encoded(np.ascontiguousarray(piece), "JPEG"),
            "label": 7 * i % 1000,
        }

    features = {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
    }
    splits = {split: [example(i) for i in range(size)] for split, size in sizes.items()}
    write(directory, "imagenet2012", "5.1.0", features, splits)
