"""The parts of benchmarks.preemption: what counts as saved, saving, and the same."""

import numpy as np
import pytest

from benchmarks import preemption


def test_saved_and_saving(tmp_path):
    assert preemption.saved(tmp_path) == 0
    assert not preemption.saving(tmp_path)
    for name in ("5", "10"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert preemption.saved(tmp_path) == 10
    assert not preemption.saving(tmp_path)
    (tmp_path / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    assert preemption.saved(tmp_path) == 10
    left_over = preemption.saving(tmp_path)
    assert len(left_over) == 1
    (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
    assert len(preemption.saving(tmp_path) - left_over) == 1


def test_differing_is_of_bits():
    zeros = {"a": np.zeros(3), "b": np.zeros(2)}
    assert preemption.differing(zeros, zeros) == []
    assert preemption.differing(zeros | {"a": -np.zeros(3)}, zeros) == ["a"]
    assert preemption.differing(zeros | {"b": np.zeros(2, np.float32)}, zeros) == ["b"]
    assert preemption.differing({"a": np.zeros(3)}, zeros) == ["b"]
    nan = {"a": np.full(2, np.nan)}
    assert preemption.differing(nan, nan) == []


class Trial:
    """Runs that are over after three kills, without processes."""

    def __init__(self, directory, wrong=None):
        self.directory, self.left, self.wrong = directory, 3, wrong
        self.args = preemption.argparse.Namespace(kills=7, seed=0)

    def undisturbed(self, work_dir):
        pass

    def start(self, work_dir):
        return work_dir

    def killed(self, work_dir, rng, in_save):
        self.left = self.left - 1 if self.left else 3
        return preemption.Kill("saving" if in_save else "training", 5) if self.left else None


def test_a_soak_counts_kills_and_runs(tmp_path, monkeypatch):
    wrong = {"run_2"}
    monkeypatch.setattr(preemption, "finish", lambda *_: None)
    monkeypatch.setattr(preemption, "outcome", lambda path: {"a": np.float32(path.name in wrong)})
    found = preemption.soak(Trial(tmp_path), preemption.Console(quiet=True))
    assert found["kills"] == found["saving"] + found["training"] == 7
    assert found["kills_of_a_run"] == [2, 3, 2]
    assert (found["runs"], found["identical"], found["different"]) == (3, 2, {2: ["a"]})
    wrong.add("first")
    with pytest.raises(SystemExit, match="two undisturbed runs differ in a"):
        preemption.soak(Trial(tmp_path), preemption.Console(quiet=True))
