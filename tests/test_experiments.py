"""The experiments, on a tiny CIFAR written to disk in the real format, and the real digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import cifar, quickstart
from experiments.data import cifar as data
from experiments.report import table1
from experiments.training import learner, models, records, sis
from experiments.training.methods import METHODS
from tests.tiny_datasets import MARKS, write_cifar

pytestmark = MARKS


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    write_cifar(directory, "cifar10", 10, {"train": 64, "test": 20})
    write_cifar(directory, "cifar100", 100, {"train": 100, "test": 10})
    return directory


def test_load(data_dir):
    (images, labels), (test_images, _) = data.load_splits("cifar10", data_dir, validation=False)
    assert images.shape == (64, 32, 32, 3)
    assert images.dtype == np.uint8
    assert test_images.shape == (20, 32, 32, 3)
    assert labels[13] == 3
    rng = np.random.default_rng(0)  # PNG loses nothing
    np.testing.assert_array_equal(images, rng.integers(0, 255, images.shape, dtype=np.uint8))
    train, held_out = data.load_splits("cifar100", data_dir, validation=True)
    assert (len(train[0]), len(held_out[0])) == (90, 10)
    assert sorted([*train[1], *held_out[1]]) == list(range(100))


def test_missing_data_says_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match="tfds build cifar10 --file_format=array_record"):
        cifar.main(["--data_dir", str(tmp_path), "--model", "small", "--epochs", "1"])


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [("--method", "riggl", "rigl"), ("--dataset", "cifar", "cifar10"), ("--model", "vgg", "vgg19")],
)
def test_unknown_names_get_the_nearest(option, value, near, capsys):
    with pytest.raises(SystemExit):
        cifar.parse([option, value])
    message = capsys.readouterr().err
    assert f"'{value}' is unknown; nearest: " in message
    assert near in message


def test_resume_needs_a_directory(capsys):
    with pytest.raises(SystemExit):
        cifar.parse(["--resume"])
    assert "--work_dir" in capsys.readouterr().err


def test_augment_shifts_and_flips():
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    out = np.asarray(data.augment(jax.random.key(1), images, pad=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    flips = 0
    for image, source in zip(out, padded, strict=True):
        crops = {
            (i, j, f): np.flip(source[i : i + 8, j : j + 8], 1)
            if f
            else source[i : i + 8, j : j + 8]
            for i in range(5)
            for j in range(5)
            for f in (False, True)
        }
        found = [key for key, crop in crops.items() if np.array_equal(crop, image)]
        assert len(found) == 1
        flips += found[0][2]
    assert 0 < flips < 16


@pytest.mark.parametrize(
    ("name", "classes", "weights"),
    [
        # VGG: convolutions 20,018,880; batch norms 2 * 5,504; head 5,130.
        ("vgg19", 10, 20_018_880 + 11_008 + 5_130),
        # ResNet-50: the known 25,557,032 of the ImageNet network, with a 3 by 3 stem (1,728
        # weights, not 9,408) and a head of 20,490 (not 2,049,000).
        ("resnet50", 10, 25_557_032 - 9_408 + 1_728 - 2_049_000 + 20_490),
        ("small", 10, 98_970),
    ],
)
def test_number_of_weights(name, classes, weights):
    from flax import nnx

    make = lambda: models.MODELS[name](classes, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    assert models.count_weights(nnx.state(nnx.eval_shape(make), nnx.Param)) == weights


def cifar_args(data_dir, tmp_path, *extra):
    command = ["--model=small", "--batch=16", "--epochs=3", "--every=2", "--quiet"]
    return cifar.parse([*command, f"--data_dir={data_dir}", f"--results={tmp_path}/r", *extra])


def test_cifar_with_a_sparse_allreduce(data_dir, tmp_path, capsys):
    record = cifar.run(cifar_args(data_dir, tmp_path, "--method=rigl", "--sparse_allreduce"))
    assert record["density"] == pytest.approx(0.05, abs=1e-3)
    assert record["options"]["sparse_allreduce"] is True
    args = cifar_args(data_dir, tmp_path, "--method=rigl", "--sparse_allreduce")
    args.batch = 9
    with pytest.raises(ValueError, match="--batch 9 must be a multiple of the 8 devices"):
        cifar.run(args)
    with pytest.raises(SystemExit):
        cifar.parse(["--method=str", "--sparse_allreduce"])
    assert "--method str trains no masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "stops"),
    # SIS prunes after 3 of 5 epochs: stopped just before that, and after it.
    [("dst_ee", [3]), ("snfs", [3]), ("str", [3]), ("sis", [4, 5])],
)
def test_resume_continues_bit_for_bit(data_dir, tmp_path, method, stops, monkeypatch):
    monkeypatch.setattr(sis, "ROWS", 32)
    options = [f"--method={method}", f"--epochs={stops[-1]}"]
    whole = cifar.run(cifar_args(data_dir, tmp_path, *options))
    for stop in stops:
        continues_bit_for_bit(data_dir, tmp_path / f"{stop}", options, whole, stop, monkeypatch)


def continues_bit_for_bit(data_dir, tmp_path, options, whole, stop, monkeypatch):
    work = [*options, f"--work_dir={tmp_path}/work"]
    real, calls = cifar.Trainer.epoch, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(cifar.Trainer, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar.run(cifar_args(data_dir, tmp_path, *work))
    monkeypatch.setattr(cifar.Trainer, "epoch", real)
    resumed = cifar.run(cifar_args(data_dir, tmp_path, *work, "--resume"))
    assert resumed["history"] == whole["history"]
    assert resumed["accuracy"] == whole["accuracy"]
    with pytest.raises(SystemExit, match=r"had --learning_rate 0\.1: pass the same"):
        cifar.run(cifar_args(data_dir, tmp_path, *work, "--resume", "--learning_rate=0.2"))
    assert list((tmp_path / "work" / "events").iterdir())


def test_an_epoch_in_segments_agrees_with_single_steps(data_dir, tmp_path):
    """Epochs of 4 steps with a mask step every 3: segments of 1 and 2 steps, two programs."""
    arrays = jax.device_put(data.load_splits("cifar10", data_dir, validation=False))[0]
    trainer = cifar.Trainer(cifar_args(data_dir, tmp_path, "--every=3", "--sparsity=0.9"), 64)
    assert list(trainer.learner.mask_steps) == [3, 6, 9]
    segmented, looped = trainer.init(), trainer.init()
    compiled = cifar.Trainer.steps._cache_size()
    for epoch in (0, 1):
        order = trainer.order(epoch, 64)
        segmented, loss = trainer.in_segments(segmented, order, epoch, *arrays)
        looped, loss_here = trainer.one_by_one(looped, order, epoch, *arrays)
        np.testing.assert_allclose(loss_here, loss, rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), segmented.params, looped.params
    )
    assert cifar.Trainer.steps._cache_size() - compiled == 2


def test_command_appends_a_record_without_paths(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cifar.py", "--data_dir", str(data_dir), "--seed", "3"])
    results = tmp_path / "runs.jsonl"
    command = ["--model=small", "--batch=32", "--epochs=1", "--method=static", "--quiet"]
    for seed in (3, 4):
        cifar.main([*command, f"--seed={seed}", f"--data_dir={data_dir}", f"--results={results}"])
    first, second = records.read(results)
    assert (first["seed"], second["seed"]) == (3, 4)
    assert first["command"] == "python -m experiments.cifar --seed 3"
    assert str(tmp_path) not in json.dumps(first)
    np.testing.assert_allclose(first["density"], 0.05, atol=1e-3)


def test_structure_option(data_dir, tmp_path):
    options = ["--method=rigl", "--structure=constant_fan_in", "--sparsity=0.9"]
    record = cifar.run(cifar_args(data_dir, tmp_path, *options))
    assert record["options"]["structure"] == "constant_fan_in"
    np.testing.assert_allclose(record["density"], 0.1, atol=0.01)  # whole weights a unit


def test_switched_off_blocks_get_a_score():
    params = {"norm": {"scale": jnp.zeros(3), "bias": jnp.zeros(3)}, "scale": jnp.full(2, 0.5)}
    on = learner.switched_on(params)
    assert on["norm"]["scale"].tolist() == [1, 1, 1]
    assert on["norm"]["bias"].tolist() == [0, 0, 0]
    assert on["scale"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_cifar_keeps_chosen_masks(data_dir, tmp_path, method):
    record = cifar.run(cifar_args(data_dir, tmp_path, f"--method={method}", "--sparsity=0.9"))
    np.testing.assert_allclose(record["density"], 0.1, atol=1e-4)
    assert record["R"] == round(record["density"], 4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dense", "dst_ee")])
def test_every_method_trains_on_the_digits(method):
    result = quickstart.train(
        method, 0.9, seeds=2, steps=200, threshold_decay=0.02, **quickstart.SCHEDULE
    )
    assert result.accuracy[:, -1].min() > {"magnitude": 5, "random_ste": 25}.get(method, 40)
    if method == "str":
        assert (result.density < 0.9).all()
    else:
        np.testing.assert_allclose(result.density, 0.1, atol=2e-3)


def test_table_1_marks_the_best_and_what_came_out():
    def run(method, sparsity, seed, accuracy, density):
        names = ("method", "sparsity", "seed", "accuracy", "density")
        return dict(zip(names, (method, sparsity, seed, accuracy, density), strict=True))

    runs = [
        run("dense", 0.0, 0, 99.0, 1.0),
        *[run("rigl", 0.95, s, 90.0 + s, 0.05) for s in (0, 1)],
        *[run("str", 0.95, s, 80.0, 0.07) for s in (0, 1)],
    ]
    lines = table1.table(runs, table1.PAPER["vgg19", "cifar10"]).splitlines()
    assert lines[0] == "| method | 95% | paper 95% |"
    assert lines[2:] == [
        "| dense | 99.00 | 93.85 ± 0.05 |",
        "| str | 80.00 ± 0.00 (at 93.0%) | 93.27 |",
        "| rigl | **90.50 ± 0.71** |  |",
    ]


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_quickstart_needs_a_seed(value, capsys):
    with pytest.raises(SystemExit):
        quickstart.main([f"--seeds={value}"])
    assert f"'{value}' must be a whole number of 1 or more" in capsys.readouterr().err


def test_quickstart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "STEPS", 200)
    path = tmp_path / "picture.png"
    quickstart.main(
        ["--methods", "dense", "dst_ee", "--sparsity", "0.9", "--seeds", "2", f"--picture={path}"]
    )
    text = capsys.readouterr().out
    assert f"picture in {path}" in text
    assert "0.1000" in text  # the density that came out
    with Image.open(path) as image:
        assert image.size[0] > 800


def test_quickstart_learns():
    result = quickstart.train("dst_ee", 0.9, seeds=2, steps=400)
    assert result.accuracy[:, -1].min() > 85
    assert (result.exploration[:, -1] > 0.1).all()
