"""The MLP whose seeds train at once, on a tiny MNIST written to disk in the real format."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dstee_jax as dstee
from experiments import mlp
from experiments.data import arrays as data
from experiments.report import table
from experiments.training import records, sis
from tests import quick
from tests.tiny_datasets import MARKS, write_cifar, write_mnist

pytestmark = MARKS
TINY = ["--widths=24", "--batch=16", "--epochs=3", "--every=4", "--sparsity=0.9", "--quiet"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    write_mnist(directory, {"train": 100, "test": 30})
    write_cifar(directory, "cifar10", 10, {"train": 40, "test": 20})
    return directory


def arguments(data_dir, *extra):
    return mlp.parse([*TINY, "--seeds", "0", "1", f"--data_dir={data_dir}", *extra])


def without_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "step_ms")}


def leaves(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_images_are_loaded_in_their_own_size_and_held_out_from_the_end(data_dir):
    images, labels = data.load("mnist", "train", data_dir)
    assert (images.shape, images.dtype) == ((100, 28, 28, 1), np.uint8)
    assert labels.tolist() == 10 * list(range(10))
    (train, train_labels), (held_out, held_out_labels) = data.hold_out((images, labels), 15)
    np.testing.assert_array_equal(np.concatenate([train, held_out]), images)
    assert (len(train_labels), held_out_labels.tolist()) == (85, [*range(5, 10), *range(10)])
    with pytest.raises(ValueError, match="--validation 100 must be less than all 100 images"):
        data.hold_out((images, labels), 100)


def test_seeds_at_once_are_as_each_seed_alone(data_dir):
    """Against the plain learner of one seed, step by step, without vmap and loops."""
    args = arguments(data_dir)
    train, _ = jax.device_put(mlp.load(args))
    trainer = mlp.Trainer(args, train[0].shape)
    state = trainer.init(train)
    assert list(trainer.mask_steps) == [4, 8, 12]  # of 3 * 6 steps, until 0.75
    learner = trainer.learner(1)
    alone, step = jax.jit(learner.init)(), jax.jit(learner.step, static_argnums=3)
    first = dstee.get_state(alone.opt_state).masks
    for epoch in range(args.epochs):
        order = trainer.order(epoch)
        assert all(len(np.unique(seed)) == 96 for seed in order)  # no image twice
        assert (order[0] != order[1]).any()
        for i, index in enumerate(order[1], start=epoch * 6 + 1):
            x, y = trainer.normalised(train[0][index]), train[1][index]
            alone, _ = step(alone, x, y, i in trainer.mask_steps)
        state, losses = trainer.epoch(state, epoch, train)
    assert losses.shape == (2,)
    assert (int(state.step), state.opt_state.count.shape) == (18, ())
    got, expected = dstee.get_state(state.opt_state), dstee.get_state(alone.opt_state)
    for name in ("masks", "counters"):
        for many, one in leaves(getattr(got, name), getattr(expected, name)):
            np.testing.assert_array_equal(many[1], one)
            assert (many[0] != many[1]).any()  # another seed is another network
    for many, one in leaves(state.params, alone.params):
        np.testing.assert_allclose(many[1], one, atol=1e-5)
    assert any((mask != one).any() for mask, one in leaves(first, expected.masks))


@pytest.mark.parametrize(
    ("method", "options", "given"),
    [
        ("dense", [], {}),
        ("static", ["--structure=constant_fan_in"], {"structure": "constant_fan_in"}),
        ("str", ["--weight_decay=5e-3"], {}),
        ("rigl", ["--no-regrow", "--drop_fraction=0"], {"regrow": False, "drop_fraction": 0.0}),
        (
            "dst_ee",
            ["--normalize", "--c=0.1", "--counter_init=zeros", "--bf16"],
            {"normalize": True, "c": 0.1, "counter_init": "zeros", "bf16": True},
        ),
    ],
)
def test_methods_and_options(data_dir, method, options, given):
    args = arguments(data_dir, f"--method={method}", "--learning_rate=0.02", *options)
    record = mlp.run(args)
    assert record["options"] == {"every": 4} | given
    assert np.mean(record["accuracy"]) > 15  # chance: 10
    if method not in ("str", "dense"):
        np.testing.assert_allclose(record["density"], 0.1, atol=0.01)
    assert record["best_accuracy"][1] == max(accuracy for accuracy, _ in record["history"][1])


def test_chosen_masks_stay(data_dir):
    """SNIP's masks leave some of the head out, which ERK would keep whole."""
    args = arguments(data_dir, "--method=snip", "--sparsity=0.6")
    train, _ = jax.device_put(mlp.load(args))
    trainer = mlp.Trainer(args, train[0].shape)
    state = trainer.init(train)
    before = jax.device_get(state.opt_state.masks)
    state, _ = trainer.epoch(state, 0, train)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.masks, before)
    weights = dict(jax.tree_util.tree_leaves_with_path(state.params))
    for path, mask in jax.tree_util.tree_leaves_with_path(before):
        assert not mask.all()
        assert (np.asarray(weights[path])[~mask] == 0).all()


def test_a_run_is_recorded_found_and_shown(data_dir, tmp_path):
    results = tmp_path / "mlp.jsonl"
    assert records.find(results, {}) is None
    command = [*TINY, "--seeds", "5", "6", f"--data_dir={data_dir}", f"--results={results}"]
    mlp.main([*command, "--validation=20", "--method=set", "--note=tiny MNIST"])
    (record,) = records.read(results)
    assert (record["seeds"], record["validation"], record["split"]) == ([5, 6], 20, "validation")
    assert np.shape(record["history"]) == (2, 3, 2)
    assert {"command", "commit", "device", "versions", "seconds"} <= record.keys()
    assert str(tmp_path) not in json.dumps(record)
    args = mlp.parse([*command, "--validation=20", "--method=set"])
    assert records.find(results, mlp.settings(args)) == record
    args.seeds = [5]
    assert records.find(results, mlp.settings(args)) is None
    one, other = records.by_seed(record)
    assert (one["seed"], other["seed"]) == (5, 6)
    assert other["accuracy"] == record["accuracy"][1] == record["history"][1][-1][0]
    shown = table.accuracy_table([one, other])
    assert "tiny MNIST, mlp 24, rescaled, validation accuracy (%), 3 epochs, 2 seeds" in shown
    assert f"| set | {records.mean_sd(record['accuracy'])} (R " in shown


def test_cifar_as_vectors(data_dir):
    record = mlp.run(
        arguments(data_dir, "--dataset=cifar10", "--widths", "16", "12", "--method=static")
    )
    assert record["model"] == "mlp 16-12"
    np.testing.assert_allclose(record["density"], 0.1, atol=1e-3)


def run_until(stop, args, monkeypatch):
    """A run that is interrupted before an epoch."""
    real = mlp.Trainer.epoch

    def epoch(self, state, now, train):
        if now == stop:
            raise KeyboardInterrupt
        return real(self, state, now, train)

    with monkeypatch.context() as patch:
        patch.setattr(mlp.Trainer, "epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            mlp.run(args)


def test_the_same_command_goes_on_bit_for_bit(data_dir, tmp_path, monkeypatch):
    """SIS prunes before the third of four epochs: stopped before that, and after it."""
    monkeypatch.setattr(sis, "ROWS", 64)
    command = ["--method=sis", "--epochs=4"]
    whole = mlp.run(arguments(data_dir, *command))
    np.testing.assert_allclose(whole["density"], 0.1, atol=0.01)
    for stop in (1, 3):
        work = [*command, f"--work_dir={tmp_path}/{stop}"]
        run_until(stop, arguments(data_dir, *work), monkeypatch)
        assert without_times(mlp.run(arguments(data_dir, *work))) == without_times(whole)
    with pytest.raises(SystemExit, match="the run in --work_dir had --seeds"):
        mlp.run(arguments(data_dir, *work, "--seeds", "2"))


def test_sigterm_and_the_same_command(data_dir, tmp_path):
    """A real process, ended by SIGTERM between two checkpoints; then on, and recorded once."""
    results = tmp_path / "runs.jsonl"
    command = [*TINY, "--epochs=15", f"--data_dir={data_dir}", f"--results={results}"]
    stopped = [*command, f"--work_dir={tmp_path}/work"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.mlp", *stopped],
        env=quick.environment(),
    )
    checkpoints = tmp_path / "work" / "checkpoints"
    while not (checkpoints / "2").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert saved < 15
    assert not results.exists()
    mlp.main(stopped)
    mlp.main(stopped)  # finished: nothing to do, and nothing to record
    (record,) = records.read(results)
    whole = mlp.run(mlp.parse(command))
    assert record["history"] == whole["history"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=riggl"], "'riggl' is unknown; nearest: rigl"),
        (["--dataset=mnits"], "'mnits' is unknown; nearest: mnist"),
        (["--sparsity=1"], r"--sparsity 1.0 must be in \[0, 1\)"),
        (["--seeds", "1", "1"], r"--seeds \[1, 1\] must be different"),
        (["--widths=0"], "'0' must be a whole number of 1 or more"),
        (["--validation=-1"], "--validation -1 must be 0"),
        (["--sparse_allreduce"], "leave it out"),
        (["--distribution=uniform_first_dense"], "pass erk or uniform"),
        (["--method=set", "--normalize"], "--normalize is for dst_ee: leave it out of set"),
        (["--tiles", "8", "16", "32"], "--tiles 8 16 32 must be one size or two"),
        (["--tiles=8", "--method=snip"], r"--tiles \(8, 8\) goes without --structure, and with a"),
        (["--tiles=48"], r"--tiles \(48, 48\) must divide all --widths"),
        (
            ["--tile_score=largest"],
            "--tile_score largest is of --tiles: pass some, or leave it out",
        ),
        (
            ["--tiles=8", "--method=static", "--tile_score=sum"],
            "static moves no tile: leave --tile_",
        ),
        (["--tiles=8", "--tile_score=most"], "--tile_score: 'most' is unknown"),
        (["--method=static", "--no-regrow"], "--regrow is for set, rigl, dst_ee"),
    ],
)
def test_wrong_arguments(options, message, capsys):
    with pytest.raises(SystemExit):
        mlp.parse(options)
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "method",
    ["srigl", "smet", "gse", "set_published", "mest_published", "cht", "chts", "dsr", "csti"],
)
def test_defaults_that_do_not_fit_say_what_does(data_dir, method):
    """A training of 18 steps has no round by the defaults, CSTI no layer as wide as the images."""
    with pytest.raises(SystemExit, match=r"no mask step.*Lower every|784 units wide"):
        mlp.main([f"--data_dir={data_dir}", "--batch=50", "--epochs=9", f"--method={method}"])


def test_data_that_is_missing_or_small(data_dir, tmp_path):
    with pytest.raises(SystemExit, match="tfds build mnist --file_format=array_record"):
        mlp.main([f"--data_dir={tmp_path}"])
    with pytest.raises(SystemExit, match="--batch 101 is more than all 100 images"):
        mlp.main([f"--data_dir={data_dir}", "--batch=101"])
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        mlp.run(arguments(data_dir, "--method=static", "--learning_rate=1e9"))
