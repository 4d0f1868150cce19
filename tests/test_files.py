"""Files of sparse networks: the same bits back, small, and nothing wrong that goes unnoticed."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dstee_jax as dstee
from dstee_jax.__main__ import main
from dstee_jax.files import reader

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
TYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "bool"]
TYPES += ["int4", "uint4", "float4_e2m1fn", "complex64", "complex128", "float64", "uint16", "int64"]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(same_bits, a, b)


def network(density=0.1, dtype=np.float32):
    """Parameters, and masks: a sparse kernel and a dense bias."""
    kernel, mask = RNG.normal(size=(40, 30)).astype(dtype), RNG.random((40, 30)) < density
    params = {"dense": {"kernel": np.where(mask, kernel, 0).astype(dtype), "bias": np.ones(30)}}
    return params, {"dense": {"kernel": mask, "bias": optax.MaskedNode()}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.4, 1.0])
def test_every_type_comes_back_bit_for_bit(path, dtype, density):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.where(RNG.random((50, 60)) < density, RNG.integers(1, 4, (50, 60)), 0).astype(dtype)
    params = {"w": x, "scalar": x[0, 0], "empty": x[:, :0]}
    dstee.save(path, params)
    saved = dstee.load(path)
    same(saved.params, {name: np.asarray(value) for name, value in params.items()})
    same(dstee.load(path, like=params).params, saved.params)
    assert jax.tree.leaves(saved.masks) == []


def test_negative_zeros_and_nans_with_a_message_come_back(path):
    x = np.zeros((20, 20), np.float32)
    x[3, 4] = -0.0
    x.view(np.uint32)[5, 6] = 0x7FC12345
    dstee.save(path, {"w": x})
    same_bits(dstee.load(path).params["w"], x)
    assert reader.header(path).leaves[0].active == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    shape=hnp.array_shapes(max_dims=4, max_side=9, min_side=0),
    block=st.tuples(*4 * [st.integers(1, 3)]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_masks_of_any_shape_and_of_blocks_come_back(tmp_path, shape, block, density, seed):
    path, rng = tmp_path / "x", np.random.default_rng(seed)
    mask = rng.random(shape) < density
    block = block[: len(shape)]
    full = np.kron(mask, np.ones(block, bool)) if mask.size else np.zeros(shape, bool)
    x = np.where(full, rng.integers(0, 3, full.shape), 0).astype(np.float32)  # active zeros too
    dstee.save(path, [x], [mask if mask.size else full])
    saved = dstee.load(path)
    same_bits(saved.params[0], x)
    same_bits(saved.masks[0], full)


def test_a_file_may_be_read_by_whom_the_umask_says(path):
    dstee.save(path, {"w": np.ones(3)})
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_gaps_by_hand():
    at = np.array([0, 1, 256, 257 + 254, 2000])  # gaps 0, 0, 254, 254, 1488 = 5 * 255 + 213
    active = np.isin(np.arange(2001), at)
    leaf, (values, gaps) = dstee.files.save.encoded((), active.astype(np.float32), None)
    assert gaps.tolist() == [0, 0, 254, 254, 255, 255, 255, 255, 255, 213]
    assert (leaf.form, values.tolist()) == ("gaps", [[1.0]] * 5)
    assert reader.places(gaps).tolist() == at.tolist()
    far = np.isin(np.arange(600), [255, 511])  # gaps 255 = 255 + 0 and 255
    assert dstee.files.save.encoded((), far.astype(np.float32), None)[1][1].tolist() == [255, 0] * 2


@pytest.mark.parametrize(("density", "form"), [(0.03, "gaps"), (0.3, "bits"), (1.0, "dense")])
def test_the_smallest_form_is_taken(path, density, form):
    params, masks = network(density)
    dstee.save(path, params, masks)
    leaf = reader.header(path).leaves[1]
    assert (leaf.name, leaf.form, leaf.masked) == ("dense/kernel", form, True)
    same(dstee.load(path).masks["dense"]["kernel"], masks["dense"]["kernel"])


def test_training_goes_on_from_a_file(path):
    """The masks of an optimizer state, tiles too; the factory takes what comes back."""
    params = {"up": {"kernel": jax.random.normal(KEY, (64, 32))}, "bias": jnp.ones(32)}
    tiles = dstee.structures.tiles((8, 16))
    for options in ({}, {"structure": tiles, "packed": True}):
        make = dict(sparsity=0.75, total_steps=300, key=KEY, **options)
        tx = dstee.transform(optax.adam(1e-2), **make)
        state = tx.init(params)
        sparse = dstee.apply_masks(params, state)
        dstee.save(path, sparse, state, {"step": 7})
        saved = dstee.load(path, like=jax.eval_shape(lambda: params))
        same(saved.params, sparse)
        assert saved.metadata == {"step": 7}
        assert reader.header(path).leaves[1].block == ((8, 16) if options else (1, 1))
        again = dstee.transform(optax.adam(1e-2), masks=saved.masks, **make | {"sparsity": None})
        same(again.init(saved.params).masks, state.masks)


def test_into_the_structures_of_flax_and_equinox(path):
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    tx = dstee.transform(optax.sgd(0.1), sparsity=0.5, total_steps=200, key=KEY)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = dstee.apply_masks(params, optimizer.opt_state)
    dstee.save(path, params, optimizer.opt_state)
    saved = dstee.load(path, like=params)
    same(saved.params, params)
    assert isinstance(jax.tree.leaves(saved.params)[0], jax.Array)
    same(dstee.apply_masks(saved.params, saved.masks), params)
    plain = dstee.load(path).params
    same_bits(
        plain["layers"][0]["kernel"],
        model.layers[0].kernel[...] * (plain["layers"][0]["kernel"] != 0),
    )

    linear = eqx.nn.MLP(4, 2, 8, 1, key=KEY)
    arrays = eqx.filter(linear, eqx.is_array)
    dstee.save(path, arrays)
    same(dstee.load(path, like=arrays).params, arrays)
    assert dstee.load(path).params["layers"][0]["weight"].shape == (8, 4)


def test_what_is_loaded_lies_as_like_does(path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.device_put(jnp.arange(8.0), place)
    dstee.save(path, {"w": x})
    assert dstee.load(path, like={"w": x}).params["w"].sharding == place
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)
    assert dstee.load(path, like={"w": shape}).params["w"].sharding == place
    assert isinstance(dstee.load(path, like={"w": np.zeros(8, np.float32)}).params["w"], np.ndarray)


def test_any_tree(path):
    tree = {"b": [np.ones(2), (np.zeros(3), {7: np.ones(1), 8: 1.5})], "none": None, "n": 3}
    dstee.save(path, tree)
    plain = dstee.load(path).params
    assert plain["n"] == 3
    assert plain["b"][1][1][7] == 1
    assert list(plain["b"][1][1]) == [7, 8]
    same(dstee.load(path, like=tree).params, tree)
    dstee.save(path, np.ones(3))
    same_bits(dstee.load(path).params, np.ones(3))
    same_bits(dstee.load(path, like=np.ones(3)).params, np.ones(3))


def test_wrong_arguments_of_save(path):
    params, masks = network()
    with pytest.raises(ValueError, match=r"dense/kernel has \d+ inactive weights that are not"):
        dstee.save(path, {"dense": params["dense"] | {"kernel": np.ones((40, 30))}}, masks)
    with pytest.raises(ValueError, match=r"mask of dense/kernel is bool of shape \(40, 30\).*\(9,"):
        dstee.save(path, {"dense": params["dense"] | {"kernel": np.ones((9, 30))}}, masks)
    with pytest.raises(ValueError, match="mask of w is int64"):
        dstee.save(path, {"w": np.ones(3)}, {"w": np.ones(3, int)})
    with pytest.raises(ValueError, match="masks have nothing for w"):
        dstee.save(path, {"w": np.ones(3)}, {"other": np.ones(3, bool)})
    with pytest.raises(ValueError, match=r"key is a PRNG key: save jax.random.key_data"):
        dstee.save(path, {"key": KEY})
    with pytest.raises(ValueError, match="name is str of <U1, no array of numbers"):
        dstee.save(path, {"name": "x"})
    with pytest.raises(ValueError, match="two leaves are called a/b"):
        dstee.save(path, {"a": {"b": 1.0}, "a/b": 2.0})
    with pytest.raises(TypeError, match="JSON"):
        dstee.save(path, params, masks, {"x": np.ones(3)})
    assert not list(path.parent.iterdir())
    with pytest.raises(FileNotFoundError):
        dstee.save(path.parent / "nowhere" / "x", params, masks)


def test_a_disk_that_is_full_leaves_the_old_file(path, monkeypatch):
    dstee.save(path, {"w": np.ones(3)})

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(sys.modules["dstee_jax.files.save"], "save_file", full)
    with pytest.raises(OSError, match=r"model.safetensors can't be written: No space left"):
        dstee.save(path, {"w": np.zeros(3)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert dstee.load(path).params["w"].all()


def test_wrong_arguments_of_load(path):
    params, masks = network()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dstee.load(path)
    dstee.save(path, params, masks)
    with pytest.raises(ValueError, match=r"lacks \['other'\], and has \['dense/kernel'\]"):
        dstee.load(path, like={"dense": {"bias": np.ones(30)}, "other": 1})
    wrong = {"dense": params["dense"] | {"bias": np.ones(31)}}
    with pytest.raises(ValueError, match=r"dense/bias has shape \(30,\) and type float64 in .*31"):
        dstee.load(path, like=wrong)
    wrong = {"dense": params["dense"] | {"bias": np.ones(30, np.float32)}}
    with pytest.raises(ValueError, match=r"float64 in .* and float32 in like="):
        dstee.load(path, like=wrong)


def rewritten(path, change, tensors=None):
    """Write a file again with another header, its checksum made right."""
    with safetensors.safe_open(path, "numpy") as file:
        said = file.metadata()
        held = {name: file.get_tensor(name) for name in file.keys()}
    rows = json.loads(said["leaves"])
    rows = change(rows) or rows
    said["leaves"] = json.dumps(rows)
    said["checksum"] = str(reader.checksum(said[name].encode() for name in ("leaves", "metadata")))
    safetensors.numpy.save_file(held | (tensors or {}), path, said)


def gaps(row, values):
    """Make other gaps right by checksum: the reader must notice by itself."""
    values = np.array(values, np.uint8)
    return {"w.gaps": values}, reader.checksum([np.ones(2, np.float32), values])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2000, 7]}, "has tensors of shapes|describes"),
        ({"shape": [-5]}, "describes w as"),
        ({"shape": [5.5]}, "describes w as"),
        ({"shape": None}, "not that of a list of leaves"),
        ({"surprise": 1}, "not that of a list of leaves"),
        ({"form": "zip"}, "describes w as"),
        ({"dtype": "O; import os"}, "describes w as"),
        ({"stored_as": "object"}, "describes w as"),
        ({"stored_as": "int32"}, "has tensors of shapes"),
        ({"block": [0]}, "describes w as"),
        ({"block": [3]}, "describes w as"),
        ({"active": 3}, "has tensors of shapes"),
        ({"active": 10**12}, "describes w as"),
        ({"path": ["v"]}, "are not the tensors that it has"),
        ({"shape": [10**14], "active": 2}, "of memory: read it on a larger one"),
        ({"checksum": 5}, "does not have the checksum that it was saved with"),
    ],
)
def test_a_header_that_is_wrong_is_an_error(path, change, message):
    x = np.zeros(1000, np.float32)
    x[[5, 900]] = 1
    dstee.save(path, {"w": x})
    rewritten(path, lambda rows: [rows[0] | change])
    with pytest.raises(ValueError, match=message):
        dstee.load(path)


@pytest.mark.parametrize(
    "wrong", [[5, 255], [5, 255, 255, 255, 255, 0], [5], [5, 0, 0], [5, 6, 255]]
)
def test_places_outside_the_array_are_an_error(path, wrong):
    x = np.zeros(1000, np.float32)
    x[[5, 900]] = 1
    dstee.save(path, {"w": x})
    tensors, checksum = gaps(x, wrong)
    rewritten(path, lambda rows: [rows[0] | {"checksum": checksum}], tensors)
    with pytest.raises(ValueError, match=r"says where|has tensors"):
        dstee.load(path)


def test_bits_outside_the_array_are_an_error(path):
    dstee.save(path, {"w": np.array([1, 0, 0, 1, 0], np.float64)})
    bits = np.array([0b100001], np.uint8)
    checksum = reader.checksum([np.ones(2), bits])
    rewritten(path, lambda rows: [rows[0] | {"checksum": checksum}], {"w.bits": bits})
    with pytest.raises(ValueError, match="says where"):
        dstee.load(path)


def test_foreign_files_and_later_versions(path):
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"was not written by dstee_jax.save"):
        dstee.load(path)
    for version in ("2", "-1", "", "1e3"):
        safetensors.numpy.save_file({}, path, {"format": "dstee_jax", "version": version})
        with pytest.raises(ValueError, match="update dstee_jax"):
            dstee.load(path)
    for content in (b"", b"abc", b"PK\x03\x04" + bytes(100), os.urandom(500), bytes(8)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no whole .safetensors file|not written by"):
            dstee.load(path)
    with pytest.raises(FileNotFoundError):
        dstee.load(path.parent)


def test_every_changed_byte_is_noticed(path):
    """Or changes nothing: what is loaded is what was saved, or nothing is."""
    params, masks = network(0.05)
    dstee.save(
        path,
        params | {"half": jnp.ones((3, 3), jnp.bfloat16)},
        masks | {"half": optax.MaskedNode()},
        {"note": "x"},
    )
    whole, right = path.read_bytes(), dstee.load(path)
    noticed, places = 0, RNG.integers(0, len(whole), 300)
    for place in [*range(24), *places]:
        changed = bytearray(whole)
        changed[place] ^= 1 << RNG.integers(8)
        path.write_bytes(changed)
        try:
            found = dstee.load(path)
        except ValueError:
            noticed += 1
            continue
        same(found.params, right.params)
        same(found.masks, right.masks)
        assert found.metadata == right.metadata
    assert noticed > 0.9 * (24 + 300)
    for length in RNG.integers(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"no whole .safetensors file"):
            dstee.load(path)


SAVING = """
import sys, numpy as np, dstee_jax as dstee
x = np.random.default_rng(0).normal(size=(4000, 1000))
while True:
    dstee.save(sys.argv[1], {"w": x}, metadata={"written": "again"})
    print("saved", flush=True)
"""


def test_a_killed_save_leaves_the_old_file(path):
    dstee.save(path, {"w": np.ones(3)}, metadata={"written": "first"})
    for wait in (0.02, 0.05):
        command = [sys.executable, "-c", SAVING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        assert dstee.load(path).metadata == {"written": "again"}  # whole


READING = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[2])
import reader
for name in ("jax", "ml_dtypes", "dstee_jax"):
    assert name not in sys.modules
try:
    import ml_dtypes
    raise SystemExit("this environment should not have ml_dtypes")
except ImportError:
    pass
found = reader.read(sys.argv[1], widen=True)
params = {leaf.name: array for leaf, array in zip(found.leaves, found.arrays)}
x = np.linspace(-1, 1, 80, dtype=np.float32).reshape(2, 40)
h = np.maximum(x @ params["up/kernel"] + params["up/bias"], 0)
np.save(sys.argv[3], h @ params["down/kernel"])
bits = reader.read(sys.argv[1])
assert [a.dtype.name for a in bits.arrays] == ["uint16", "float32", "float32", "uint8"]
print([leaf.dtype for leaf in bits.leaves])
"""


@pytest.fixture
def numpy_alone(tmp_path):
    """Runs Python with NumPy and safetensors, and nothing else that is installed here."""
    site = tmp_path / "site"
    site.mkdir()
    for module in (np, safetensors):
        folder = Path(module.__file__).parent
        for one in (folder, folder.with_name(folder.name + ".libs")):
            if one.exists():
                (site / one.name).symlink_to(one)
    environment = {"PYTHONPATH": str(site), "PATH": os.environ["PATH"]}
    return lambda *words: subprocess.run(
        [sys.executable, "-S", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_numpy_and_safetensors_alone_read_what_another_process_saved(path, tmp_path, numpy_alone):
    up, down = RNG.normal(size=(40, 30)), RNG.normal(size=(30, 5))
    down = jnp.where(RNG.random(down.shape) < 0.2, down, 0).astype(jnp.bfloat16)
    up = jnp.where(RNG.random(up.shape) < 0.05, up, 0).astype(jnp.float32)
    params = {"up": {"kernel": up, "bias": jnp.ones(30)}, "down": {"kernel": down}}
    dstee.save(path, params | {"z": jnp.ones(4, jnp.float8_e4m3fn)})
    out = tmp_path / "logits.npy"
    done = numpy_alone("-c", READING, path, Path(reader.__file__).parent, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['bfloat16', 'float32', 'float32', 'float8_e4m3fn']"
    x = np.linspace(-1, 1, 80, dtype=np.float32).reshape(2, 40)
    h = np.maximum(x @ np.asarray(up) + 1, 0)
    np.testing.assert_allclose(np.load(out), h @ np.asarray(down, np.float32), rtol=1e-5)


def test_the_reader_by_its_path(path, tmp_path, numpy_alone):
    params, masks = network(0.05)
    dstee.save(path, params, masks, {"accuracy": 97})
    shown = numpy_alone(reader.__file__, path)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["leaf", "shape", "type", "form", "active", "bytes"]
    assert lines[2].split()[:4] == ["dense/kernel", "40x30", "float32", "gaps"]
    assert lines[-1] == 'metadata: {"accuracy": 97}'
    assert numpy_alone(reader.__file__, path, tmp_path / "out.npz").returncode == 0
    with np.load(tmp_path / "out.npz") as arrays:
        same_bits(arrays["dense/kernel"], params["dense"]["kernel"])
    missing = numpy_alone(reader.__file__, tmp_path / "none")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: there is no file")
    assert "usage" in numpy_alone(reader.__file__).stderr


def test_the_commands(path, tmp_path, capsys):
    params, masks = network(0.05)
    dstee.save(path, params, masks)
    main(["show", str(path)])
    assert "40x30  float32  gaps" in capsys.readouterr().out
    out = tmp_path / "dense.safetensors"
    main(["unpack", str(path), str(out)])
    same_bits(safetensors.numpy.load_file(out)["dense.kernel"], params["dense"]["kernel"])
    with pytest.raises(SystemExit, match="error: there is no file"):
        main(["show", "none"])
    with pytest.raises(SystemExit, match=r"error: .* was not written by dstee_jax.save"):
        main(["unpack", str(out), str(path)])


def test_other_forms():
    params, masks = network(0.1)
    kernel, mask = params["dense"]["kernel"], masks["dense"]["kernel"].copy()
    zero = tuple(np.argwhere(~mask)[0])
    mask[zero] = True  # active, and zero
    x = RNG.normal(size=(3, 40)).astype(np.float32)
    csr, bcsr = dstee.to_scipy(kernel, mask), dstee.to_bcsr(kernel.T, mask.T)
    for product in (x @ csr, (bcsr @ x.T).T):
        np.testing.assert_allclose(product, x @ kernel, rtol=1e-5, atol=1e-6)
        assert product.dtype == np.float32
    assert csr.nnz == bcsr.nse == mask.sum()
    assert dstee.to_scipy(kernel).nnz == mask.sum() - 1
    np.testing.assert_array_equal(dstee.to_scipy(kernel).toarray(), kernel)
    half = jnp.asarray(kernel, jnp.bfloat16)
    assert dstee.to_scipy(half).dtype == np.float32
    assert dstee.to_bcsr(half).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), and CSR has two axes"):
        dstee.to_scipy(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"mask is bool of shape \(3,\), the kernel has \(40, 30"):
        dstee.to_bcsr(kernel, np.ones(3, bool))


def test_dense_files_for_others(path):
    conv = RNG.normal(size=(3, 5, 4, 6)).astype(np.float32)
    half = jnp.asarray(RNG.normal(size=(4, 2)), jnp.bfloat16)
    params = {"conv": {"kernel": conv, "bias": np.ones(6)}, "out": [half], "embedding": np.eye(3)}
    dstee.save_dense(path, params, kernels="out_in")
    with safetensors.safe_open(path, "numpy") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        assert file.metadata() == {"kernels": "out_in", "turned": '["conv.kernel", "out.0"]'}
        same_bits(file.get_tensor("conv.kernel"), np.moveaxis(conv, (-1, -2), (0, 1)).copy())
    assert kinds == {"conv.kernel": "F32", "conv.bias": "F64", "out.0": "BF16", "embedding": "F64"}
    data = path.read_bytes()  # row-major bits of the transposed kernel, as the format says
    length = struct.unpack("<Q", data[:8])[0]
    begin, end = json.loads(data[8 : 8 + length])["out.0"]["data_offsets"]
    assert data[8 + length :][begin:end] == np.asarray(half).T.copy().tobytes()
    dstee.save_dense(path, params, separator="/")
    with safetensors.safe_open(path, "numpy") as file:
        assert file.get_slice("conv/kernel").get_shape() == [3, 5, 4, 6]
    with pytest.raises(ValueError, match="kernels='torch' must be 'in_out'"):
        dstee.save_dense(path, params, kernels="torch")
    with pytest.raises(ValueError, match=r"w has type int4, which \.safetensors does not have"):
        dstee.save_dense(path, {"w": jnp.ones(3, jnp.int4)})
    with pytest.raises(ValueError, match=r"two leaves are called a\.b"):
        dstee.save_dense(path, {"a": {"b": 1.0}, "a.b": 2.0})
