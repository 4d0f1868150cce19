"""Runs as small files: what the last checkpoint holds, into the network of the run."""

import jax
import numpy as np
import pytest
from flax import nnx

import dstee_jax as dstee
from experiments import cifar, mlp, pack
from experiments.training.checkpoints import Checkpoints
from experiments.training.models import MODELS
from tests.tiny_datasets import MARKS, write_cifar, write_mnist

pytestmark = MARKS


def restored(work):
    return Checkpoints(work, keep=True).restore_plain()


def test_a_seed_of_a_run_in_tiles(tmp_path, capsys):
    write_mnist(tmp_path, {"train": 100, "test": 30})
    work, file = tmp_path / "work", tmp_path / "network.safetensors"
    command = ["--widths=32", "--tiles=8", "--batch=16", "--epochs=2", "--every=4", "--quiet"]
    command += [f"--data_dir={tmp_path}", f"--results={tmp_path / 'r'}", "--sparsity=0.5"]
    mlp.main([*command, "--method=rigl", "--seeds", "3", "5", f"--work_dir={work}"])
    pack.main([str(work), str(file), "--seed=5"])
    assert "bytes, of 101,800 when dense" in capsys.readouterr().out
    saved, state = dstee.load(file), restored(work)
    kernel = state["params"]["layers"]["0"]["kernel"]["value"][1]
    np.testing.assert_array_equal(saved.params["layers"]["0"]["kernel"], kernel)
    mask = np.asarray(state["opt_state"]["masks"]["layers"]["0"]["kernel"]["value"][1])
    full = np.kron(mask, np.ones((8, 8), bool))
    np.testing.assert_array_equal(saved.masks["layers"]["0"]["kernel"], full)
    assert (saved.metadata["checkpoint"], saved.metadata["settings"]["seed"]) == (2, 5)
    with pytest.raises(SystemExit):
        pack.main([str(work), str(file), "--seed=4"])
    assert "--seed 4 is not of the seeds of this run: [3, 5]" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*No such file"):
        pack.main([str(work), str(tmp_path / "nowhere" / "x")])


def test_a_convolutional_run_with_thresholds_and_batch_statistics(tmp_path):
    write_cifar(tmp_path, "cifar10", 10, {"train": 40, "test": 20})
    work, file = tmp_path / "work", tmp_path / "network.safetensors"
    command = ["--model=small", "--method=str", "--epochs=1", "--batch=20", "--quiet"]
    command += [f"--data_dir={tmp_path}", f"--results={tmp_path / 'r'}", f"--work_dir={work}"]
    cifar.main([*command])
    pack.main([str(work), str(file)])
    model = MODELS["small"](10, dtype=np.float32, rngs=nnx.Rngs(0))
    like = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    saved, state = dstee.load(file, like=like), restored(work)
    found, stats = pack.by_name(saved.params), pack.by_name(state["stats"])
    assert stats
    for name, value in stats.items():
        np.testing.assert_array_equal(found[name], value)
    weights = pack.by_name(state["params"]["weights"])
    assert weights.keys() | stats.keys() == found.keys()
    shares = [np.mean(found[n] == 0) for n, w in weights.items() if n.endswith("kernel")]
    assert min(shares) > 0.01  # behind the threshold
    masks = pack.by_name(saved.masks)
    assert masks.keys() == {n for n in weights if n.endswith("kernel")}
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name] != 0, mask)
    assert not any(np.signbit(x[x == 0]).any() for x in found.values())


def test_what_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path), "x"])
    assert "has no checkpoints in it: pass the --work_dir" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SystemExit, match="error: no checkpoint under"):
        pack.main([str(tmp_path), "x"])


@pytest.mark.parametrize("method", ["powerpropagation", "random_ste"])
def test_what_the_network_sees_is_packed(tmp_path, method):
    write_mnist(tmp_path, {"train": 100, "test": 30})
    work, file = tmp_path / "work", tmp_path / "network.safetensors"
    command = ["--widths=32", "--batch=16", "--epochs=2", "--every=3", "--quiet"]
    command += [
        f"--method={method}",
        "--sparsity=0.75",
        "--seeds",
        "3",
        "5",
        f"--data_dir={tmp_path}",
    ]
    command += [f"--results={tmp_path / 'r'}", f"--work_dir={work}"]
    mlp.main(command)
    pack.main([str(work), str(file), "--seed=5"])
    args = mlp.parse(command)
    train, _ = mlp.load(args)
    trainer = mlp.Trainer(args, train[0].shape)
    state, rows = Checkpoints(work, keep=True).restore(trainer.init(train))
    learner = trainer.learner(5)
    own = jax.tree.map(lambda x: x[1], state.params)
    seen = learner.seen(state._replace(params=own))
    saved = dstee.load(file)
    for name, value in pack.by_name(seen).items():
        np.testing.assert_array_equal(pack.by_name(saved.params)[name], value)
    masks = pack.by_name(saved.masks)
    assert masks.keys() == {"layers/0/kernel", "layers/1/kernel"}
    share = np.mean(np.concatenate([mask.ravel() for mask in masks.values()]))
    np.testing.assert_allclose(share, 0.25, atol=0.01)
    np.testing.assert_allclose(rows[-1]["density"][1], share, atol=1e-6)
    assert rows[-1]["accuracy"][1] > 15  # chance: 10
