"""The language model: text in three parts, a causal network, perplexity by its definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dstee_jax as dstee
from dstee_jax.tiled_nnx import set_tiles
from dstee_jax.trees import unwrap
from experiments import lm, pack
from experiments.data import text
from experiments.training import progress, records

TINY = ["--layers", "2", "--width", "16", "--heads", "2", "--length", "16", "--batch", "4"]
WORDS = "the cat sat on the mat and the dog lay by the door. " * 100


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def model():
    return lm.Transformer(2, 16, 2, 16, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_no_text_is_in_two_parts():
    documents = text.python_documents()
    parts = text.split(documents)
    assert text.describe(parts) == text.describe(text.split(text.python_documents()))
    whole = [part.tobytes().decode() for part in parts]
    for name, document in documents.items():
        assert sum(document in part for part in whole) == 1, name
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} for part in whole]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not paragraphs[i] & paragraphs[j]
    shares = np.array([len(part) for part in parts]) / sum(map(len, parts))
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.06)
    assert sum(map(len, parts)) > 300_000


def test_files_are_cut_by_position(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(70)))
    (tmp_path / "b").write_bytes(bytes(range(70, 100)))
    parts = text.load([tmp_path / "a", tmp_path / "b"], 9)
    assert [len(part) for part in parts] == [80, 10, 10]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(100))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40])
def test_windows_predict_every_byte_once(size):
    part = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    inputs, targets, counted = text.windows(part, length=4, batch=2)
    assert inputs.shape == targets.shape == counted.shape == (-(-size // 8), 2, 4)
    np.testing.assert_array_equal(targets[counted], part)
    np.testing.assert_array_equal(inputs[counted], np.append(ord("\n"), part[:-1]))


def test_layers_are_stacked_and_only_their_kernels_sparse(model):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): (path, x)
        for path, x in leaves
    }
    sparse = {name for name, (path, x) in shapes.items() if lm.in_blocks(path, x)}
    heads = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert sparse == heads | {"blocks/up/kernel", "blocks/down/kernel"}
    assert shapes["blocks/attention/query/kernel"][1].shape == (2, 16, 2, 8)
    assert shapes["blocks/attention/out/kernel"][1].shape == (2, 2, 8, 16)
    stacked = {name for name, (path, x) in shapes.items() if lm.stack_axes(path, x)}
    assert stacked == {name for name in shapes if name.startswith("blocks/")}
    first, second = shapes["blocks/up/kernel"][1]
    assert (first != second).all()  # each layer has a start of its own


def test_the_model_is_causal(model):
    tokens = np.random.default_rng(1).integers(0, 256, (2, 12))
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = np.asarray(model(tokens)), np.asarray(model(changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_perplexity_is_that_of_the_logits(model):
    part = np.frombuffer(WORDS[:100].encode(), np.uint8)
    graph, params = nnx.split(model)

    def total_loss(params, inputs, targets, counted):
        logits = nnx.merge(graph, params)(inputs)
        return jnp.sum(lm.losses(logits, targets), where=counted)

    found = lm.perplexity(jax.jit(total_loss), params, part, length=16, batch=4)
    nats = []
    for begin in range(0, 100, 16):  # by hand: window by window, byte by byte
        bytes_ = part[begin : begin + 16]
        before = np.append(part[begin - 1] if begin else ord("\n"), bytes_[:-1])
        before = np.resize(before, 16)[None].astype(np.int32)  # what follows is not seen
        logits = np.asarray(model(before)[0], np.float64)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        nats += [-np.log(p[i, byte]) for i, byte in enumerate(bytes_)]
    assert len(nats) == 100
    np.testing.assert_allclose(found, np.exp(np.mean(nats)), rtol=1e-5)


def test_a_run_learns_stays_sparse_and_is_recorded(words, tmp_path, monkeypatch, capsys):
    kept = {}
    perplexity = lm.Trainer.perplexity

    def seen(self, state, part):
        kept["params"], kept["masks"] = jax.device_get((state[0], dstee.get_state(state[2]).masks))
        return perplexity(self, state, part)

    monkeypatch.setattr(lm.Trainer, "perplexity", seen)
    results = tmp_path / "lm.jsonl"
    command = [*TINY, "--steps", "40", "--every", "8", "--sparsity", "0.8"]
    lm.main([*command, "--text", str(words), "--results", str(results), "--learning_rate", "1e-2"])
    (record,) = records.read(results)
    assert record["method"] == "dst_ee"
    assert record["text"]["bytes"] == {"train": 4160, "validation": 520, "test": 520}
    assert [row[0] for row in record["history"]] == [8, 16, 24, 32, 40]
    assert record["perplexity"] < 30
    assert record["validation_perplexity"] == record["history"][-1][1] < record["history"][0][1]
    assert record["density"] == pytest.approx(0.2, abs=2e-3)
    assert record["R"] > 0.21
    masked = 0
    for path, mask in jax.tree_util.tree_leaves_with_path(kept["masks"]):
        weights = kept["params"]
        for entry in path:
            weights = weights[entry.key]
        assert (weights[~mask] == 0).all()
        assert (weights[mask] != 0).mean() > 0.7  # the last grown may not have moved
        masked += 1
    assert masked == 6
    assert "test perplexity" in capsys.readouterr().out
    lm.main(["--table", str(results)])
    assert (
        f"| dst_ee | {record['perplexity']:.3f} (R {record['R']:.3f}) |" in capsys.readouterr().out
    )


def test_the_network_in_tiles_is_the_same_network(model):
    tokens = np.random.default_rng(2).integers(0, 256, (2, 12))
    tiled = lm.Transformer(2, 16, 2, 16, tiled=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(tiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    tx = dstee.transform(
        optax.identity(),
        structure=dstee.structures.tiles((4, 4)),
        sparsity=0.5,
        distribution=dstee.uniform,
        where=lm.in_blocks,
        stack_axes=lm.stack_axes,
        total_steps=1,
        every=None,
        key=jax.random.key(0),
    )
    params = nnx.state(tiled, nnx.Param)
    opt_state = tx.init(params)
    nnx.update(tiled, dstee.apply_masks(params, opt_state))
    masked = tiled(tokens)
    set_tiles(tiled, opt_state)
    shapes = {
        name: layer.kernel.shape
        for name, layer in vars(tiled.blocks.attention).items()
        if isinstance(layer, nnx.Linear)
    }
    assert shapes == dict.fromkeys(("query", "key", "value", "out"), (2, 4, 8, 4))
    assert tiled.blocks.up.kernel.ndim == tiled.blocks.down.kernel.ndim == 4
    np.testing.assert_allclose(tiled(tokens), masked, rtol=1e-4, atol=1e-5)


def test_a_run_in_tiles_that_was_killed_ends_as_if_it_was_not(words, tmp_path, monkeypatch):
    saved = []
    save = lm.Checkpoints.save

    def seen(self, step, state, notes):
        save(self, step, state, notes)
        saved.append(jax.device_get(unwrap(state)))
        if len(saved) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(lm.Checkpoints, "save", seen)
    command = [*TINY, "--layers", "1", "--tiles", "4", "--steps", "10", "--every", "3", "--quiet"]
    command += ["--sparsity", "0.5", "--text", str(words), "--results", str(tmp_path / "lm.jsonl")]
    command += ["--work_dir"]
    stop = None
    lm.main([*command, str(tmp_path / "whole")])
    whole, stop = saved.pop(), 2  # after step 4; steps 3 and 6 are mask steps
    saved.clear()
    with pytest.raises(KeyboardInterrupt):
        lm.main([*command, str(tmp_path / "killed")])
    lm.main([*command, str(tmp_path / "killed")])
    assert len(saved) == 5
    assert jax.tree.structure(saved[-1]) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, saved[-1], whole)
    first, second = records.read(tmp_path / "lm.jsonl")
    assert (first["perplexity"], first["history"]) == (second["perplexity"], second["history"])
    assert first["tiles"] == [4, 4]
    assert first["density"] == pytest.approx(0.5, abs=0.1)
    params, index, opt_state = whole
    assert index["blocks"]["up"]["tiles"].shape == (16, 64)
    assert params["blocks"]["up"]["kernel"].shape[-1] == 4
    before, after = (jax.tree.leaves(state.indices) for state in (saved[0][2], opt_state))
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    pack.main([str(tmp_path / "whole"), str(tmp_path / "network")])
    packed = dstee.load(tmp_path / "network").params["blocks"]["up"]["kernel"]
    up = index["blocks"]["up"]["tiles"].dense(params["blocks"]["up"]["kernel"])
    np.testing.assert_array_equal(packed, up)
    with pytest.raises(SystemExit, match=r"--work_dir had --learning_rate 0.005: pass the same"):
        lm.main([*command, str(tmp_path / "killed"), "--learning_rate", "1e-3"])


def test_the_time_of_a_step(monkeypatch):
    now = iter([10.0, 11.0, 20.0, 21.5, 30.0, 30.1])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    pace = progress.Pace()
    pace.stop(5)  # in which programs are compiled
    assert pace.ms(5) is None
    for first, last in ((5, 10), (10, 15), (15, 16)):  # the last part is a short one
        pace.start(first)
        pace.stop(last)
    assert pace.ms(5) == 200


def test_dense_has_one_density_and_fills_each_column(words, tmp_path):
    args = lm.parse(["--method", "dense", *TINY, "--steps", "2", "--quiet", "--text", str(words)])
    record = lm.run(args, text.load(args.text, args.length))
    assert (record["sparsity"], record["density"], record["R"]) == (0.0, 1.0, 1.0)
    sparse = [
        record | {"method": "set", "sparsity": s, "R": 0.5, "density": 0.1} for s in (0.9, 0.95)
    ]
    runs = [record | {"perplexity": 3.0}, record | {"perplexity": 5.0, "seed": 1}, *sparse]
    lines = lm.table(runs).splitlines()
    assert lines[2:5] == ["| method | 90% | 95% |", "| --- | --- | --- |", lines[4]]
    assert lines[5] == f"| set | {record['perplexity']:.3f} (R 0.500) | " + (
        f"{record['perplexity']:.3f} (R 0.500, 10.0% active) |"
    )
    tiled = {"method": "set", "sparsity": 0.9, "tiles": [1, 32]}
    assert ", tiles of 1 x 32, test perplexity" in lm.table([*runs, record | tiled])
    del record["tiles"]  # as in records from before there were any
    assert "tiles" not in lm.table([record])
    assert lines[4] == "| dense | 4.000 ± 1.414 | 4.000 ± 1.414 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gmp"], "--method gmp does not keep the count of every layer"),
        (["--method", "snip"], "pass one of dense, static, set"),
        (["--method", "rigel"], "nearest: rigl"),
        (["--sparsity", "1.0"], r"--sparsity 1.0 must be in \[0, 1\)"),
        (["--width", "30"], "--width 30 must be a multiple of --heads 4"),
        (["--heads", "0"], "--heads 0 must be 1 or more"),
        (["--steps", "1"], "--steps 1 must be 2 or more"),
        (["--tiles", "0"], "'0' must be a whole number of 1 or more"),
        (["--tiles", "48"], r"--width 128 must be a multiple of --tiles \(48, 48\)"),
        (["--tiles", "1", "48"], r"--width 128 must be a multiple of --tiles \(1, 48\)"),
        (["--tiles", "1", "2", "3"], r"--tiles 1 2 3 must be one size or two: 32, or 1 32"),
        (["--tiles", "8", "--method", "dense"], "--method dense has no masks: leave --tiles out"),
        (["--tiles", "8", "--method", "snfs"], "--method snfs does not keep .* pass one of dense"),
        (["--work_dir", "run", "--seed", "0", "1"], "--work_dir holds one run: pass one --seed"),
        (["--structure", "constant_fan_in"], "--structure constant_fan_in is not for stacked"),
        (["--distribution", "uniform_first_dense"], "pass erk or uniform"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lm.parse(arguments)
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


def test_texts_that_are_missing_or_short(tmp_path):
    (tmp_path / "short").write_text("a" * 1000)
    with pytest.raises(SystemExit, match=r"no text at .*nowhere: pass --text"):
        lm.main(["--text", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"validation part has 100 bytes, .*--length 128"):
        lm.main(["--text", str(tmp_path / "short")])
    with pytest.raises(SystemExit, match="nowhere"):
        lm.main(["--table", str(tmp_path / "nowhere")])
