"""ImageNet training: real processes, killed and resumed; real photographs in the real format."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import imagenet
from experiments.data import imagenet as imagenet_input
from experiments.report import table2
from experiments.training import records, sis
from experiments.training.checkpoints import Checkpoints
from tests import quick
from tests.tiny_datasets import MARKS, write_imagenet

pytestmark = MARKS


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    write_imagenet(directory, {"train": 40, "validation": 21})
    return directory


@pytest.fixture(scope="module")
def examples(data_dir):
    return [imagenet_input.source(split, data_dir) for split in ("train", "validation")]


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b):
    return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# --- input


def test_batches_do_not_depend_on_processes_and_workers(examples):
    make = lambda **kw: imagenet_input.train_batches(  # noqa: E731
        examples[0], batch=8, size=24, seed=3, **kw
    )
    whole = take(make(), 12)  # more than two epochs
    parts = [take(make(process=p, processes=2), 12) for p in (0, 1)]
    joined = [
        {k: np.concatenate([one[k], two[k]]) for k in one} for one, two in zip(*parts, strict=True)
    ]
    assert same(whole, joined)
    assert same(whole, take(make(workers=2), 12))
    first, second = (sorted(np.concatenate([b["label"] for b in whole[i : i + 5]])) for i in (0, 5))
    assert first == second == sorted(e["label"] for e in examples[0])  # each once an epoch
    assert not np.array_equal(whole[0]["label"], whole[5]["label"])  # in another order


@pytest.mark.parametrize("workers", [0, 2])
def test_input_goes_on_from_its_state(examples, workers):
    make = lambda: imagenet_input.train_batches(  # noqa: E731
        examples[0], batch=8, size=16, seed=0, workers=workers
    )
    batches = make()
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    after = take(batches, 3)
    resumed = make()
    resumed.set_state(state)
    assert same(after, take(resumed, 3))


@pytest.mark.parametrize(("batch", "processes"), [(8, 1), (8, 2), (32, 2), (21, 1)])
def test_validation_counts_each_image_once(examples, batch, processes):
    labels, sizes = [], set()
    for p in range(processes):
        for b in imagenet_input.validation_batches(
            examples[1], batch=batch, size=16, process=p, processes=processes
        ):
            labels += b["label"].tolist()
            sizes.add(len(b["label"]))
    assert sorted(x for x in labels if x >= 0) == sorted(e["label"] for e in examples[1])
    assert sizes == {batch // processes}


def test_crops():
    """A crop of a ramp shows which box it is: all within the image, of area and shape asked."""
    height, width = 60, 90
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([2 * rows, 2 * columns, rows], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        crop = imagenet_input.random_resized_crop(ramp, rng, 16).astype(float) / 2
        h, w = (np.ptp(crop[..., i]) * 16 / 15 for i in (0, 1))
        assert crop[..., 0].max() < height
        assert crop[..., 1].max() < width
        shares.append(h * w / (height * width))
        assert 0.55 < w / h < 1.7  # 3/4 to 4/3, as far as whole grey levels tell
    assert min(shares) < 0.15
    assert 0.8 < max(shares) < 1.15
    centre = imagenet_input.centre_crop(ramp, 52, keep=52 / 60)
    np.testing.assert_array_equal(centre, ramp[4:56, 19:71])


def test_bytes_that_are_no_image():
    with pytest.raises(ValueError, match=r"4 bytes that are no JPEG or PNG image: b'oops'"):
        imagenet_input.decode(b"oops")


# --- processes


def command(data_dir, work_dir, *extra):
    return [
        *(sys.executable, "-m", "experiments.imagenet", "--model=small", "--image_size=16"),
        *("--batch=8", "--steps=12", "--warmup_epochs=0.4", "--every=3", "--sparsity=0.9"),
        *("--workers=0", "--log_every=3", "--save_every=2", f"--data_dir={data_dir}"),
        *(f"--work_dir={work_dir}", f"--results={work_dir}/runs.jsonl", *extra),
    ]


def start(data_dir, work_dir, *extra, devices=8, **options):
    return subprocess.Popen(
        command(data_dir, work_dir, *extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=quick.environment(devices),
        **options,
    )


def finish(*processes):
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return outputs[0]


def plain(work_dir):
    state = Checkpoints(work_dir, keep=True).restore_plain()
    names, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    arrays = [
        np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for x in leaves
    ]
    return {jax.tree_util.keystr(n): a for n, a in zip(names, arrays, strict=True)}


def saved_step(work_dir):
    found = (work_dir / "checkpoints").glob("[0-9]*")
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """A run that nobody disturbed."""
    work_dir = tmp_path_factory.mktemp("whole")
    assert "step 12/12" in finish(start(data_dir, work_dir))
    return work_dir


def test_stopped_killed_and_resumed_is_bit_identical(data_dir, whole, tmp_path):
    """SIGTERM, then SIGKILL: to the whole process group, workers included, as a scheduler does."""
    # Evaluated once, at the end: each evaluation starts a worker of its own.
    options = ["--eval_every=1000", "--workers=1"]
    soon = [*options, "--log_every=1", "--save_every=1000"]
    process = start(data_dir, tmp_path, *soon, start_new_session=True)
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert "SIGTERM: saved at step" in finish(process)
    stopped = saved_step(tmp_path)
    assert 1 <= stopped < 12
    process = start(data_dir, tmp_path, *options, "--save_every=1", start_new_session=True)
    while saved_step(tmp_path) <= stopped and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # whatever it is doing then
    assert f"from step {stopped}" in process.communicate()[0]
    killed = saved_step(tmp_path)
    assert stopped < killed < 12
    assert f"from step {killed}" in finish(start(data_dir, tmp_path, *options))
    expected, got = plain(whole), plain(tmp_path)
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    a, b = (records.read(d / "metrics.jsonl") for d in (whole, tmp_path))
    steps = [row["step"] for row in b if "loss" in row]
    assert steps == sorted(set(steps))  # each once, though some were taken twice
    assert a[-1] == b[-1]  # the accuracy
    (record,) = records.read(tmp_path / "runs.jsonl")
    assert record["accuracy"] == records.read(whole / "runs.jsonl")[0]["accuracy"]


def check_close(got, expected):
    """Masks, counters and steps are equal, floats to rounding."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        if array.dtype == bool or array.dtype.kind in "ui":
            np.testing.assert_array_equal(got[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def two_processes(data_dir, work_dir, *extra):
    """The processes of a run that has two, of four devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"--coordinator=localhost:{probe.getsockname()[1]}"
    options = [*extra, address, "--num_processes=2"]
    return [start(data_dir, work_dir, *options, f"--process_id={i}", devices=4) for i in (0, 1)]


def test_two_processes_agree_with_one(data_dir, whole, tmp_path):
    finish(*two_processes(data_dir, tmp_path))
    check_close(plain(tmp_path), plain(whole))
    assert accuracies(tmp_path) == accuracies(whole)


def accuracies(work_dir):
    """By the step, of every evaluation."""
    rows = records.read(work_dir / "metrics.jsonl")
    return {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}


LOST_AFTER = 15  # seconds until a process that is silent counts as dead


def test_a_process_that_dies_stops_the_others_and_the_restart_resumes(data_dir, whole, tmp_path):
    """Sharded over two processes; restored on another number of devices; equal to one process."""
    pair = two_processes(data_dir, tmp_path, "--shard_params", f"--lost_after={LOST_AFTER}")
    while saved_step(tmp_path) < 6 and all(p.poll() is None for p in pair):
        time.sleep(0.01)
    pair[1].kill()
    output = pair[0].communicate(timeout=LOST_AFTER + 20)[0]
    # The next collective fails, or the coordination service finds out first.
    assert pair[0].returncode in (1, -signal.SIGABRT), output
    assert "start the same command again" in output or "another task died" in output
    pair[1].communicate()
    resumed = saved_step(tmp_path)
    assert 6 <= resumed < 12
    assert accuracies(tmp_path)[5] == accuracies(whole)[5]  # of two processes
    assert f"from step {resumed}" in finish(start(data_dir, tmp_path, "--shard_params", devices=2))
    check_close(plain(tmp_path), plain(whole))
    assert accuracies(tmp_path) == accuracies(whole)


# --- in this process


def run(data_dir, work_dir, *extra):
    work_dir.mkdir(exist_ok=True)
    args = imagenet.parse([*command(data_dir, work_dir)[3:], "--quiet", *extra])
    return imagenet.run(args)


def test_random_images_in_bfloat16(tmp_path, capsys):
    command_ = command("nowhere", tmp_path, "--fake_data", "--bf16", "--steps=6")[3:]
    imagenet.main(command_)
    (record,) = records.read(tmp_path / "runs.jsonl")
    assert (record["data"], record["options"]["bf16"]) == ("random images", True)
    assert record["images_per_s"] > 0
    assert list((tmp_path / "events").iterdir())
    imagenet.main(command_)  # complete: nothing is trained or recorded again
    assert len(records.read(tmp_path / "runs.jsonl")) == 1


def test_sparse_allreduce(data_dir, tmp_path):
    """Masks, counts and density of the run; batch norm sees one image here, so no more."""
    record = run(data_dir, tmp_path, "--sparse_allreduce", "--batch=16", "--steps=6")
    assert record["density"] == pytest.approx(0.1, abs=1e-4)
    assert record["R"] > 0.1
    assert record["options"]["sparse_allreduce"] is True


def test_sharded_parameters_train_the_same(data_dir, whole, tmp_path):
    record = run(data_dir, tmp_path, "--shard_params")
    assert record["density"] == pytest.approx(0.1, abs=1e-4)
    for name, array in plain(whole).items():
        np.testing.assert_allclose(
            plain(tmp_path)[name].astype(np.float64), array, rtol=1e-3, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("shape", "shard", "spec"),
    [
        ((3, 3, 64, 128), True, P(None, None, None, "data")),
        ((3, 3, 64, 33), True, P(None, None, "data")),
        ((3, 5), True, P()),
        ((64, 64), False, P()),
    ],
)
def test_sharding_is_along_the_longest_axis_that_divides(shape, shard, spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert imagenet.sharding_of(mesh, shape, shard).spec == spec


@pytest.mark.parametrize(
    "options", [["--method=str"], ["--method=sis"], ["--method=top_kast", "--shard_params"]]
)
def test_methods_that_train_in_another_way(data_dir, tmp_path, options, monkeypatch):
    monkeypatch.setattr(sis, "ROWS", 32)
    record = run(data_dir, tmp_path, *options, "--batch=16", "--steps=6")
    if options != ["--method=str"]:
        assert record["density"] == pytest.approx(0.1, abs=1e-4)
    again = run(data_dir, tmp_path, *options, "--batch=16", "--steps=6")
    assert again == record  # a finished run has nothing left to do


@pytest.mark.parametrize(
    ("save_every", "message"),
    [(100, r"loss is (nan|inf) at step [2-9]"), (1, r"a parameter is not finite after step [1-9]")],
)
def test_not_finite(data_dir, tmp_path, save_every, message):
    options = [
        "--learning_rate=1e4",
        "--weight_decay=3e38",
        "--warmup_epochs=0",
        f"--save_every={save_every}",
    ]
    with pytest.raises(FloatingPointError, match=message + ".*--learning_rate.*another --work_dir"):
        run(data_dir, tmp_path, *options)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch=9"], "--batch 9 must be a multiple of the 8 devices"),
        (["--batch=48"], "--batch 48 is more than all 40 images"),
        (["--data_dir=nowhere"], "tfds build imagenet2012 --file_format=array_record"),
    ],
)
def test_bad_input(data_dir, tmp_path, extra, message):
    arguments = [*command(data_dir, tmp_path)[3:], "--quiet", *extra]
    with pytest.raises(SystemExit, match=message):
        imagenet.main(arguments)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method=riggl"], "'riggl' is unknown; nearest: rigl"),
        (["--method=sis", "--shard_params"], "leave --shard_params out"),
        (["--coordinator=localhost:1"], "needs --num_processes and --process_id"),
        (["--method=dense", "--sparse_allreduce"], "leave --sparse_allreduce out"),
        (["--shard_params", "--sparse_allreduce"], "keeps the parameters whole"),
        (["--method=snip", "--fake_data"], "leave --fake_data out"),
        (["--work_dir=gs://bucket/run"], "is no directory: mount the bucket"),
    ],
)
def test_bad_arguments(extra, message, capsys):
    with pytest.raises(SystemExit):
        imagenet.parse(["--work_dir=x", *extra])
    assert message in capsys.readouterr().err


def test_another_command_in_the_same_directory_is_refused(whole, data_dir):
    with pytest.raises(SystemExit, match=r"had --sparsity 0.9: pass the same, or another"):
        run(data_dir, whole, "--sparsity=0.8")


def test_table_2_takes_recorded_masks(tmp_path, capsys):
    masks = jax.tree.map(jnp.asarray, table2.masks_of("erk", 0.9))
    Checkpoints(tmp_path, keep=True).save(1, {"opt_state": {"masks": masks}}, {})
    table2.main(["--masks", f"snfs={tmp_path}"])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| snfs"))
    # ERK at 90%, with a dense gradient on each step: (2 * 0.242 + 1) / 3.
    assert row == ("| snfs | recorded | n/a | n/a | n/a | n/a | 0.495× | n/a | 0.242× | n/a |")
    for given, message in [("snfs", "give METHOD=DIR"), (f"set={tmp_path}/no", "no checkpoint")]:
        with pytest.raises(SystemExit):
            table2.main(["--masks", given])
        assert message in capsys.readouterr().err


def test_table_2(capsys):
    table2.main([])
    printed = capsys.readouterr().out
    rows = {
        line.split(" | ")[0] + line.split(" | ")[1]: line
        for line in printed.splitlines()
        if "×" in line
    }
    assert "8.178e+09" in printed
    assert "3.143e+18" in printed
    assert "0.416× | 0.23 | 0.414× | 0.42 | 0.244× | 0.10 | 0.242× | 0.24" in rows["| dst_eeerk"]
    assert "0.200× | 0.23 | 0.200×" in rows["| setuniform"]
    assert "0.223× | 0.23 | 0.223× | 0.23 | 0.126×" in rows["| setuniform_first_dense"]
