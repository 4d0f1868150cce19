"""Figures, theory, ablation, configs: by definition where there is one, and end to end, small."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dstee_jax as dstee
from experiments import cifar, imagenet, linkpred, quickstart
from experiments.report import animation, figures, write_configs
from experiments.studies import ablation, exploitation, figure1, theory
from experiments.training import records
from experiments.training.checkpoints import Checkpoints

RNG = np.random.default_rng(0)


def drawn(tmp_path, name):
    with Image.open(tmp_path / f"{name}.png") as image:
        assert image.size[0] > 700
        assert np.asarray(image.convert("L")).std() > 10  # there is something on it
    assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_ignored_share_by_hand():
    inactive = np.array([[True, True, False, True], [True, False, True, True]])
    later = np.array([[5.0, -4, 9, 1], [0.1, 9, -3, 2]])  # important for k = 3: 5, -4, -3
    score = np.array([[1.0, 0, 9, 8], [7, 9, 6, 0]])  # grown: 8, 7, 6, of which 6 is important
    assert figure1.ignored_share(inactive, later, score, 3) == (3, pytest.approx(2 / 3))
    assert figure1.ignored_share(inactive, later, abs(later), 3) == (3, 0.0)
    assert figure1.ignored_share(inactive, later, score, 100) == (6, 0.0)


@pytest.mark.parametrize("step", [25, 50, 75, 100])
def test_figure_1_grows_as_many_as_the_library(step):
    assert figure1.number_grown(1000, 150, total_steps=400) == 150  # half of 0.3, half way
    params = {"kernel": jnp.asarray(RNG.normal(size=(40, 20)), jnp.float32)}
    options = {"drop_fraction": figure1.DROP_FRACTION, "stop": figure1.STOP}
    options |= {"every": 25, "regrow": False, "sparsity": 0.5, "total_steps": 133}
    tx = dstee.methods.set(key=jax.random.key(0), **options)
    state = tx.init(params)._replace(count=jnp.int32(step - 1))
    mask = tx.update(params, state, params, grad=params)[1].masks["kernel"]
    grown = int((mask & ~state.masks["kernel"]).sum())
    assert grown == figure1.number_grown(400, step, total_steps=133)


def test_figure_1(tmp_path, monkeypatch):
    monkeypatch.setattr(figure1, "AT", 3)
    monkeypatch.setattr(figure1, "LATER", 5)
    arrays = (
        RNG.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8),
        RNG.integers(0, 10, 256).astype(np.int32),
    )
    monkeypatch.setattr(figure1.data, "load", lambda *_: arrays)
    results = tmp_path / "figure1.jsonl"
    figure1.main(["--model=small", "--epochs=400", f"--results={results}"])
    (run,) = records.read(results)
    assert [row["method"] for row in run["rows"]] == ["rigl"] * 4 + ["dst_ee"] * 4
    assert all(0 <= row["ignored"] <= 1 and 0 < row["k"] for row in run["rows"])
    figures.main(["figure1", f"--records={results}", f"--out={tmp_path}"])
    drawn(tmp_path, "figure1")


def test_figure_2_shows_the_librarys_own_update(tmp_path):
    figures.main(["figure2", f"--out={tmp_path}"])
    drawn(tmp_path, "figure2")
    again = tmp_path / "again"
    figures.main(["figure2", f"--out={again}"])
    assert (again / "figure2.svg").read_bytes() == (tmp_path / "figure2.svg").read_bytes()


def test_figure_3(tmp_path):
    def run(c, seed, sparsity):
        history = np.sort(RNG.random((5, 2)), 0).tolist()
        data = {"data": "CIFAR-10", "model": "small", "sparsity": sparsity, "seed": seed}
        length = {"steps": 1950, "epochs": 5}
        return data | {"options": {"c": c, "every": 100}, "history": history} | length

    rows = [run(c, s, p) for c in (1e-4, 1e-3) for s in (0, 1) for p in (0.95, 0.98)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures.main(["figure3", f"--records={path}", f"--out={tmp_path}"])
    drawn(tmp_path, "figure3")


def test_exploitation(tmp_path, monkeypatch):
    """Gradient growth falls faster than random growth in the rounds that it grows in."""
    monkeypatch.setattr(quickstart, "STEPS", 300)
    runs = [exploitation.train(m, 0.95, 0, steps=300) for m in ("set", "rigl")]
    assert all(len(run["exploitation"]) == 5 for run in runs)
    assert np.mean(runs[1]["exploitation"]) > np.mean(runs[0]["exploitation"])
    assert runs[0]["R"][-1] > runs[1]["R"][-1] > 0.05
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    figures.main(["exploitation", f"--records={path}", f"--out={tmp_path}"])
    drawn(tmp_path, "exploitation")


def test_masks_from_a_checkpoint(tmp_path):
    params = {"a": {"kernel": jnp.ones((20, 10))}, "b": {"kernel": jnp.ones((10, 10))}}
    tx = dstee.methods.static(sparsity=0.5, total_steps=10, key=jax.random.key(0))
    Checkpoints(tmp_path, keep=True).save(1, {"opt_state": tx.init(params)}, {})
    figures.main(["masks", f"--work_dir={tmp_path}", f"--out={tmp_path}"])
    drawn(tmp_path, "masks")


@pytest.mark.parametrize("name", ["length", "tiles", "tiles_lm", "linkpred", "lm"])
def test_of_the_committed_records(tmp_path, name):
    figures.main([name, f"--out={tmp_path}"])
    drawn(tmp_path, name)


def test_animation(tmp_path, monkeypatch):
    """A frame before, one after each round and one at the end; what it shows is the training's."""
    seen = list(animation.moments(steps=112))
    assert [moment.step for moment in seen] == [0, 50, 100, 112]
    for before, now in itertools.pairwise(seen):
        assert now.mask.sum() == before.mask.sum()
        np.testing.assert_array_equal(now.grown, now.mask & ~before.mask)
        assert not (before.explored & ~now.explored).any()
    assert seen[1].grown.any()
    assert not seen[-1].grown.any()
    monkeypatch.setattr(animation, "moments", lambda steps: iter(seen))
    figures.main(["animation", f"--out={tmp_path}"])
    with Image.open(tmp_path / "animation.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)


def test_figures_without_records(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: .*no\.jsonl"):
        figures.main(["figure1", f"--records={tmp_path}/no.jsonl"])
    with pytest.raises(SystemExit):
        figures.main(["masks"])
    assert "masks needs --work_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no checkpoint under"):
        figures.main(["masks", f"--work_dir={tmp_path}"])


def test_theory(tmp_path, monkeypatch, capsys):
    problem = theory.make_problem()
    w = RNG.normal(size=theory.SHAPE).astype(np.float32)
    np.testing.assert_allclose(problem.gradient(w), jax.grad(problem.loss)(w), atol=1e-4)
    values = np.linalg.eigvalsh(np.asarray(problem.curvature, np.float64))
    np.testing.assert_allclose([values.min(), values.max()], [0.5, 1.0], atol=1e-5)
    trace = theory.trace(problem, jax.random.key(0), theory.rate_of(64), 64)
    assert (np.asarray(trace.error) > 0).all()  # each round drops something
    assert (trace.error < 0.1 * trace.size).all()
    assert trace.loss[-1] < trace.loss[0]
    monkeypatch.setattr(theory.convergence, "__defaults__", (2, (256, 1024, 4096)))
    theory.main(["--seeds=2", f"--results={tmp_path}/theory.jsonl"])
    (run,) = records.read(tmp_path / "theory.jsonl")
    second = run["proposition_2"]
    assert np.all(np.diff(second["above_floor"]) < 0)
    assert second["slopes"][1] < second["slopes"][0] < 0  # steeper, on the way to -1/2
    assert run["proposition_1"]["holds"] == 1.0
    assert run["proposition_1"]["bound"][0] > run["proposition_1"]["change"][0]
    figures.main(["theory", f"--records={tmp_path}/theory.jsonl", f"--out={tmp_path}"])
    drawn(tmp_path, "theory")


def test_ablation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "STEPS", 200)
    results = tmp_path / "r.jsonl"
    ablation.main(["--seeds=2", "--options", "regrow", f"--results={results}"])
    runs = records.read(results)
    assert [(r["option"], r["value"]) for r in runs[::2]] == [("base", None), ("regrow", True)]
    capsys.readouterr()
    ablation.main(["--table", str(results)])
    lines = capsys.readouterr().out.splitlines()
    base = np.array([r["accuracy"] for r in runs[:2]])
    gain = np.array([r["accuracy"] for r in runs[2:4]]) - base
    assert f"| {gain.mean():+.2f} | {gain.std(ddof=1) / 2**0.5:.2f} |" in lines[5]


# --- one file for each published row


def test_configs_are_written_by_the_command(tmp_path, monkeypatch):
    committed = {p.name: p.read_text() for p in write_configs.CONFIGS.glob("*.txt")}
    monkeypatch.setattr(write_configs, "CONFIGS", tmp_path)
    (tmp_path / "table9_old.txt").write_text("# gone")
    write_configs.main([])
    assert {p.name: p.read_text() for p in tmp_path.glob("*.txt")} == committed
    # Table 1: 4 networks, 10 rows for VGG-19 and 8 for ResNet-50, and DST-EE's long ones.
    assert len(committed) == 2 * 11 + 2 * 9 + 11 + 2 * 3


@pytest.mark.parametrize("path", sorted(write_configs.CONFIGS.glob("*.txt")), ids=lambda p: p.stem)
def test_config(path):
    text = path.read_text()
    for word in ("expected", "command", "hardware", "time"):
        assert re.search(rf"^# {word}: .{{4}}", text, re.MULTILINE)
    (command,) = re.findall(r"python -m (experiments\.\w+ @.*)", text)
    module, argument, *rest = command.split()
    assert argument == f"@experiments/configs/{path.name}"
    parse = {"cifar": cifar, "imagenet": imagenet, "linkpred": linkpred}[module.split(".")[1]].parse
    args = parse([f"@{path}", *rest])
    method = re.sub(r"table\d_(vgg19_|resnet50_)?(cifar\d+_)?|_250", "", path.stem)
    assert args.method in (method, [method])
    assert args.epochs == (250 if path.stem.endswith("_250") else args.epochs)
