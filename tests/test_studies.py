"""Studies that are queues of runs: by hand-made records, and end to end on a tiny MNIST."""

import argparse
import math

import numpy as np
import pytest
from PIL import Image

from dstee_jax import scales
from experiments import linkpred, mlp
from experiments.report import figures, table, table1
from experiments.studies import (
    ablation,
    growth,
    length,
    methods,
    queue,
    spikes,
    tile_choice,
    tiles,
    tiles_lm,
)
from experiments.training import records
from experiments.training.methods import METHODS
from tests.tiny_datasets import write_cifar, write_mnist

# Raised inside tensorflow-datasets, by its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    write_mnist(directory, {"train": 40, "test": 20})
    write_cifar(directory, "cifar10", 10, {"train": 40, "test": 20})
    return directory


def record(words, accuracies, *extra):
    """As `experiments.mlp` would append it, with these accuracies."""
    args = mlp.parse([*words, *extra, "--seeds", *map(str, range(len(accuracies)))])
    own = {"data": args.note or args.dataset, "R": [0.1] * len(accuracies)}
    own |= {name: accuracies for name in ("accuracy", "best_accuracy", "density", "history")}
    return mlp.settings(args) | own


def test_every_row_of_the_length_study_is_known_again():
    rows = length.ROWS | length.ABLATION
    for name, words in rows.items():
        assert length.name_of(record(words, [0.0])) == name
    assert length.name_of(record(["--method=snip"], [0.0])) is None


def test_gains_are_paired_by_seed():
    base = {0: {"accuracy": 90.0}, 1: {"accuracy": 80.0}, 2: {"accuracy": 70.0}}
    one = {0: {"accuracy": 91.0}, 1: {"accuracy": 83.0}, 7: {"accuracy": 0.0}}
    mean, error, seeds = length.gain(one, base)  # gains 1 and 3: standard deviation sqrt(2)
    assert (mean, error, seeds) == (2.0, pytest.approx(1.0), 2)
    assert length.gain({0: one[0]}, base)[0] == 1.0
    assert math.isnan(length.gain({0: one[0]}, base)[1])


def test_the_table_and_the_figure_of_the_length_study(tmp_path):
    rigl, dst_ee = length.ROWS[length.RIGL], length.ROWS[length.DST_EE]
    path = tmp_path / "length.jsonl"
    for epochs, more in ((5, 1.0), (40, 2.0)):
        records.append(path, record(rigl, [90.0, 80.0], f"--epochs={epochs}"))
        records.append(path, record(dst_ee, [90.0 + more, 80.0], f"--epochs={epochs}"))
    lines = length.table(records.read(path)).splitlines()
    assert lines[2:] == [
        "| method | 5 epochs | 40 epochs | mean gain |",
        "| --- | --- | --- | --- |",
        "| RigL | 85.00 ± 7.07 | 85.00 ± 7.07 |  |",
        "| DST-EE, c = 0.001 | 85.50 ± 7.78 [+0.50 ± 0.50] | 86.00 ± 8.49 [+1.00 ± 1.00] "
        "| +0.75 ± 0.750 |",
    ]
    assert "mnist, mlp 300-100, 98% sparse, test accuracy" in lines[0]
    assert "standard deviation, 2 seeds;" in lines[0]
    records.append(path, record(length.ROWS["static"], [70.0], "--epochs=5"))
    assert "| static | 70.00 (1 seeds) [-20.00 ± nan] |  |  |" in length.table(records.read(path))
    figures.main(["length", f"--records={path}", f"--out={tmp_path}"])
    with Image.open(tmp_path / "length.png") as image:
        assert np.asarray(image.convert("L")).std() > 10  # there is something on it


def test_a_queue_goes_on_where_it_was_stopped(tmp_path, data_dir, monkeypatch, capsys):
    tiny = ("--batch=10", "--widths", "16", "--distribution=uniform")
    rows = {"static": length.ROWS["static"]}
    part = length.Part(0.9, (1, 2), rows, seeds=2, words=tiny)
    monkeypatch.setattr(length, "AT_ONCE", 1)
    monkeypatch.setattr(length, "PARTS", length.PARTS | {"c": part})
    monkeypatch.setattr(length, "name_of", lambda run: run["method"])
    path = tmp_path / "length.jsonl"
    command = ["--parts", "c", f"--results={path}", f"--data_dir={data_dir}"]
    length.main([*command, "--minutes=0"])
    assert "4 runs are left" in capsys.readouterr().out
    trained, run = [], mlp.run

    def stopped(args, arrays):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((args.seeds, args.epochs))
        return run(args, arrays)

    monkeypatch.setattr(mlp, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        length.main(command)
    assert trained == [([0], 1), ([0], 2), ([1], 1)]
    monkeypatch.setattr(mlp, "run", lambda *args: trained.append("again") or run(*args))
    for _ in range(2):  # the second time nothing is left
        length.main(command)
        assert "| static |" in capsys.readouterr().out
        assert trained[3:] == ["again"]
    found = [(record["seeds"], record["epochs"]) for record in records.read(path)]
    assert found == [([0], 1), ([0], 2), ([1], 1), ([1], 2)]


def test_records_and_data_that_are_missing(tmp_path, capsys):
    """Of every command that prints records, and of a queue."""
    nowhere = str(tmp_path / "nowhere")
    for program in (length, tiles, tiles_lm, tile_choice, growth, ablation, linkpred):
        with pytest.raises(SystemExit):
            program.main(["--table", nowhere])
        assert f"there is no file {nowhere}" in capsys.readouterr().err
    for program in (table, table1):
        with pytest.raises(SystemExit):
            program.main([nowhere])
        assert f"there is no file {nowhere}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: no mnist under .* Make it with: tfds build"):
        length.main([f"--data_dir={nowhere}", f"--results={tmp_path / 'r'}"])


def test_a_run_of_the_convolutional_network_is_found_again(tmp_path, data_dir):
    words = ["--model=small", "--epochs=1", "--batch=10", "--method=static", "--sparsity=0.9"]
    words += [f"--results={tmp_path / 'length.jsonl'}", f"--data_dir={data_dir}"]
    one = queue.cifar_run(3, *words)
    record = one.train(one.load())
    assert one.settings.items() <= record.items()
    assert record["seed"] == 3


def test_the_tile_study(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(tiles, "TILES", ((), (32, 32)))
    monkeypatch.setattr(tiles, "METHODS", ("static",))
    monkeypatch.setattr(tiles, "MOVING", ("dst_ee",))
    often = {"--method=dst_ee": ("--every=2",)}
    monkeypatch.setattr(tiles, "mlp_run", lambda *w: queue.mlp_run(*w, *often.get(w[0], ())))
    path = tmp_path / "tiles.jsonl"
    monkeypatch.setattr(tiles, "WIDTHS", ("64", "64"))
    command = ["--epochs=1", "--seeds=2", f"--results={path}", f"--data_dir={data_dir}"]
    monkeypatch.setattr(tiles, "SPARSITIES", (0.5,))
    monkeypatch.setattr(tiles, "BATCH", 10)
    tiles.main(command)
    runs = records.read(path)
    asked = [(run["method"], run["options"]) for run in runs]
    assert asked[:2] == [("static", {}), ("static", {"tiles": [32, 32]})]
    moving = {"every": 2, "tiles": [32, 32]}
    variants = {"tile_score": "largest"}, {"drop_fraction": 0.1}, {"drop_fraction": 0.5}
    assert asked[2:] == [("dst_ee", moving | variant) for variant in variants]
    monkeypatch.setattr(tiles, "METHODS", ("dst_ee", "static"))
    for name in ("by the largest score", "drop fraction 0.1", "drop fraction 0.5"):
        assert f"| 32 x 32, {name} | " in tiles.table(runs)
    monkeypatch.setattr(tiles, "METHODS", ("static",))
    shown = capsys.readouterr().out
    assert "| free |" in shown
    assert "| 32 x 32 |" in shown
    tiles.main([f"--table={path}"])
    assert capsys.readouterr().out in shown
    figures.main(["tiles", f"--records={path}", f"--out={tmp_path}"])
    with Image.open(tmp_path / "tiles.png") as image:
        assert np.asarray(image.convert("L")).std() > 10  # there is something on it


def test_the_tile_study_of_the_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiles_lm, "TILES", ((), (1, 8)))
    monkeypatch.setattr(tiles_lm, "SPARSITIES", (0.5,))
    monkeypatch.setattr(tiles_lm, "QUEUED", (("static",),))
    monkeypatch.setattr(tiles_lm, "WIDTH", 16)
    words = tmp_path / "words.txt"
    words.write_text("a word is a word " * 60)
    monkeypatch.setattr(tiles_lm, "LAYERS", 1)
    tiny = ("--length=16", "--batch=4", "--text", str(words))
    monkeypatch.setattr(tiles_lm, "lm_run", lambda *given: queue.lm_run(*given, *tiny))
    path = tmp_path / "tiles_lm.jsonl"
    command = ["--steps=4", "--seeds=2", f"--results={path}"]
    tiles_lm.main(command)
    runs = records.read(path)
    found = [(run["seed"], run["tiles"]) for run in runs]
    assert found == [(0, None), (0, [1, 8]), (1, None), (1, [1, 8])]
    shown = capsys.readouterr().out
    assert "50% sparse, 1 layers of width 16, 4 steps, text" in shown
    tiles_lm.main(command)  # nothing is left
    assert len(records.read(path)) == len(runs) == 4
    assert all(run["step_ms"] > 0 for run in runs)
    tiles_lm.main([f"--table={path}"])
    assert "| 1 x 8 |" in capsys.readouterr().out
    figures.main(["tiles_lm", f"--records={path}", f"--out={tmp_path}"])
    with Image.open(tmp_path / "tiles_lm.png") as image:
        assert np.asarray(image.convert("L")).std() > 10  # there is something on it
    moved = runs[0] | {"method": "rigl"}
    moving = [moved | {"options": {"every": every}} for every in (2, 3)]
    two, three = tiles_lm.groups([*runs, *moving])
    assert "a mask update every 2," in two
    assert "a mask update every 3," in three
    found = tiles_lm.cells(tiles_lm.groups([*runs, *moving])[three])
    # Of the moving masks the one interval; static ones are in each group.
    assert {key: len(mine) for key, mine in found.items()} == {
        ((), "rigl"): 1,
        ((), "static"): 2,
        ((1, 8), "static"): 2,
    }


def test_what_a_round_chose_by_hand():
    kernel = np.arange(-4.0, 4.0).reshape(1, 2, 4)  # two tiles of 2 x 2 side by side
    assert tile_choice.squares(kernel, np.ones((1, 1, 2), bool)).tolist() == [[[26, 18]]]
    np.testing.assert_array_equal(tile_choice.squares(kernel, kernel > 0), kernel**2)
    before, after = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool), np.array([[1, 1], [0, 1]], bool)
    weights = np.array([[6, 5, 1, 0], [0, 0, 0, 0]])
    grads = np.array([[70, 80, 90, 1], [3, 1, 0, 0]])
    exchanged = before.copy()
    exchanged[0, 2], exchanged[1, 0] = False, True
    rows = [(before, exchanged, weights, grads), (after, after, 0 * after, 0 * after)]
    assert tile_choice.compared(rows) == {
        "exchanged": round(100 / 6, 3),  # 1 of 3 + 3
        "dropped": 0.5,  # 1, where the mean active weight is 12 / 6
        "grown": 3.6,  # 3, where the mean inactive one is 5 / 6
    }
    with pytest.raises(ValueError, match="nothing was exchanged: each column has one tile"):
        tile_choice.compared(rows[1:])


def test_how_much_there_is_to_choose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tile_choice, "TILES", ((), (1, 4)))
    for name, value in {"WIDTH": 16, "LAYERS": 1, "STEPS": 8, "UPDATE": 3}.items():
        monkeypatch.setattr(tile_choice, name, value)
    path = tmp_path / "tile_choice.jsonl"
    command = ["--seeds=1", f"--results={path}"]
    tile_choice.main(command)
    free, tiled = records.read(path)
    assert (free["tiles"], tiled["tiles"]) == (None, [1, 4])
    assert 0 < free["dropped"] < 0.1 < tiled["dropped"] < 1
    assert 1 < tiled["grown"] < free["grown"]
    assert 0 < tiled["exchanged"] < 30
    tile_choice.main(command)  # nothing is left
    assert "| 1 x 4 | " in capsys.readouterr().out
    assert len(records.read(path)) == 2


class Masks:
    """A round of one seed, by hand."""

    def __init__(self, before, after, ever):
        before, after, ever = (np.array(x, bool) for x in (before, after, ever))
        self.grown, self.dropped, self.after = after & ~before, before & ~after, after
        self.new = self.grown & ~ever


def test_what_a_rule_grew_by_hand():
    first = Masks([1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0])  # grows 2, which is new
    second = Masks([0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0])  # grows 0, back from the round before
    last = np.array([1, 0, 0, 1], bool)
    found = growth.counted([first, second], last, dead=np.array([0, 0, 1, 0], bool))
    assert found == {"grown": 2, "new": 50, "back": 50, "dead": 50, "stay": 50, "last": 50}


def test_the_growth_study(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(growth, "METHODS", ("RigL, no regrowth",))
    rows = {"RigL, no regrowth": ("--method=rigl", "--no-regrow", "--every=3", "--batch=10")}
    monkeypatch.setattr(growth, "ROWS", rows)
    monkeypatch.setattr(growth, "name_of", lambda run: run["method"])
    path = tmp_path / "growth.jsonl"
    command = [f"--results={path}", f"--data_dir={data_dir}", "--sparsity=0.9"]
    growth.main([*command, "--epochs=4", "--seeds=2"])
    (run,) = records.read(path)
    assert "| rigl |" in capsys.readouterr().out
    assert run["grown"][0] == run["grown"][1] > 0  # what the drop fraction says, for every seed
    assert all(0 <= x <= 100 for name in growth.SHARES for x in run[name])
    assert run["dead"] == [0, 0]  # noise has no constant pixel


def test_jumps_of_a_language_models_loss(tmp_path, monkeypatch, capsys):
    words = "the quick brown fox jumps over the lazy dog\n" * 20
    documents = {str(i): words for i in range(20)}
    monkeypatch.setattr(spikes.texts, "python_documents", lambda: documents)
    monkeypatch.setattr(spikes, "METHODS", ("set",))
    monkeypatch.setattr(spikes, "SCALES", {"none": None, "warm-up": scales.warm_up(4)})
    monkeypatch.setattr(spikes, "AFTER", (0, 1, 2))
    monkeypatch.setattr(spikes, "PROBE", 4)
    monkeypatch.setattr(spikes, "MODEL", ("--layers=1", "--width=16"))
    results = tmp_path / "spikes.jsonl"
    options = ["--steps=16", "--every=4", "--seeds=1", f"--results={results}"]
    spikes.main(options)
    none, warm = records.read(results)
    assert none["scale"] == "none"
    assert np.shape(none["jumps"]) == (3, 3)  # updates at steps 4, 8 and 12
    first, second = np.array(none["jumps"]), np.array(warm["jumps"])
    assert first[0, 0] == second[0, 0] != 0  # until then nothing had been grown
    assert (first[0, 1:] != second[0, 1:]).all()
    assert "| set | warm-up |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        spikes.main(["--every=2"])
    assert "--every 2 must be more than 2" in capsys.readouterr().err


def test_the_study_of_methods_has_every_method_once_a_sparsity(tmp_path):
    args = argparse.Namespace(results=tmp_path / "methods.jsonl", data_dir=tmp_path)
    found = [(run.settings["method"], run.settings["sparsity"]) for run in methods.queue(args)]
    expected = {(name, at) for name in METHODS for at in (0.98, 0.95)}
    expected -= {(name, at) for name in ("dense", "str", "csti") for at in (0.98, 0.95)}
    assert len(found) == len(set(found))
    assert set(found) == expected | {("dense", 0.0)}
    run = record(["--dataset=mnist", *methods.words("cht")], [96.0, 97.0])
    assert run["options"] == {"every": 234}
    assert methods.table([run]).splitlines()[-1] == "| cht | 96.50 ± 0.71 (R 0.100) |"
