"""Save the parameters of a sparse network in a small file: what is zero takes no room."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dstee_jax.files import reader
from dstee_jax.masks.given import by_leaf
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name

# Unsigned integers for the bits of types that the format does not have, by bytes of an entry.
_BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "uint64"}


def save(
    path: str | os.PathLike, params: PyTree, masks: PyTree | None = None, metadata: Any = None
) -> None:
    """Save parameters, and their masks, in one `.safetensors` file, without loss.

    Each leaf takes its smallest form: dense; or its active weights, in row-major order, with a
    bit for each place or with the gaps between them, a byte each (smallest from about 0.5 to
    12% density). Masks of tiles are kept for tiles. `load` gives the same bits back. The file is
    complete or not there at all: a save that is killed leaves the file that was there before.

    Args:
      path: of the file, `.safetensors` by custom.
      params: pytree of arrays of any type, dense kernels (`to_dense` if they are in tiles).
        Python numbers become arrays. On several hosts all of it must be addressable here.
      masks: pytree of bool arrays with the structure of `params`, `optax.MaskedNode()` for a
        dense leaf; or an optimizer state that holds them. Active weights that happen to be zero
        are then kept as active. Without masks, what is not zero is stored.
      metadata: anything that JSON can hold, as `{"sparsity": 0.9, "accuracy": 97.1}`.

    Raises:
      OSError: the file can't be written.
      ValueError: an inactive weight is not zero, a leaf is no array of numbers, a mask does not
        fit, or two leaves have one name; names the leaf.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax, os, tempfile
      >>> params = {"kernel": jnp.ones((256, 100)), "bias": jnp.zeros(100)}
      >>> tx = dstee.transform(optax.sgd(0.1), sparsity=0.95, total_steps=200,
      ...                      key=jax.random.key(0))
      >>> opt_state = tx.init(params)
      >>> params = dstee.apply_masks(params, opt_state)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> dstee.save(path, params, opt_state, {"sparsity": 0.95})
      >>> os.path.getsize(path) < 0.1 * 4 * 256 * 100
      True
      >>> saved = dstee.load(path)
      >>> bool((saved.params["kernel"] == params["kernel"]).all()), saved.metadata
      (True, {'sparsity': 0.95})
    """
    leaves: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for keys, x, mask in _arrays(params, masks):
        leaf, stored = encoded(keys, x, mask)
        if tensors.keys() & set(leaf.tensors()):
            raise ValueError(f"two leaves are called {leaf.name} in a file: rename one.")
        leaves.append(leaf._asdict())
        tensors.update(zip(leaf.tensors(), stored, strict=True))
    texts = {"leaves": json.dumps(leaves), "metadata": json.dumps(metadata)}
    check = reader.checksum(text.encode() for text in texts.values())
    said = {"format": reader.FORMAT, "version": str(reader.VERSION), "checksum": str(check)}
    write_whole(Path(path), tensors, said | texts)


def write_whole(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a .safetensors file in one go: who is killed meanwhile leaves the file as it was."""
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it: safetensors writes for the owner alone
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _arrays(params: PyTree, masks: PyTree) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]:
    """The key path, array and mask of each leaf; masks may be those of tiles."""
    leaves = [(path, leaf) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
    own = [optax.MaskedNode()] * len(leaves) if masks is None else by_leaf(masks, params)
    for (path, leaf), mask in zip(leaves, own, strict=True):
        yield path, host_array(path, leaf), None if is_dense(mask) else np.asarray(mask)


def host_array(path: Any, leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array; a ValueError that names it if it is none of numbers."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{path_name(path)} is a PRNG key: save jax.random.key_data(key).")
        if not leaf.is_fully_addressable:
            raise ValueError(
                f"{path_name(path)} lies on several hosts: gather it first, with "
                "jax.experimental.multihost_utils.process_allgather."
            )
    x = np.asarray(leaf)
    if not (jnp.issubdtype(x.dtype, np.number) or x.dtype == bool) or x.dtype == jax.dtypes.float0:
        kind = type(leaf).__name__
        raise ValueError(f"{path_name(path)} is {kind} of {x.dtype}, no array of numbers.")
    return x


def encoded(
    keys: Any, x: np.ndarray, mask: np.ndarray | None
) -> tuple[reader.Leaf, list[np.ndarray]]:
    """A leaf in its smallest form: its description, and what is stored of it.

    Args:
      keys: its path, as JAX gives it.
      x: the array.
      mask: bool, of the array's shape or of its tiles; None without one.
    """
    bits, extra = as_bits(x)
    block = _block(keys, x, mask)
    leaf = reader.Leaf(
        path=tuple(map(_key, keys)),
        form="dense",
        shape=x.shape,
        dtype=str(x.dtype),
        block=block,
        masked=mask is not None,
        active=0,
        stored_as=str(bits.dtype),
        checksum=0,
    )
    boxes = to_boxes(bits, block, extra)
    rows = _unsigned(boxes).reshape(len(boxes), math.prod(boxes.shape[1:]))
    nonzero = np.asarray(rows.any(1))
    active = nonzero if mask is None else mask.reshape(-1)
    if (nonzero & ~active).any():
        raise ValueError(
            f"{leaf.name} has {int((nonzero & ~active).sum())} inactive weights that are not zero: "
            "dstee.apply_masks(params, masks) makes them zero."
        )
    forms = _forms(active)
    where = min(forms, key=lambda form: forms[form].nbytes)
    smaller = forms[where].nbytes + boxes[:1].nbytes * active.sum() < bits.nbytes
    if smaller or (not active.all() and mask is not None):
        stored = [boxes[active], forms[where]]
        leaf = leaf._replace(form=where, active=int(active.sum()))
    else:
        stored = [bits]
    return leaf._replace(checksum=reader.checksum(stored)), stored


def as_bits(x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """An array as a type that the format has, and the axes that this adds at its end."""
    x = np.ascontiguousarray(x).reshape(x.shape)
    if str(x.dtype) in reader.CODES:
        return x, ()
    extra = (2,) if x.itemsize == 16 else ()
    return x[..., None].view(_BITS[x.itemsize]).reshape(x.shape + extra), extra


def _unsigned(x: np.ndarray) -> np.ndarray:
    """The bits of an array: -0.0 is not zero, and nothing about a NaN is lost."""
    return x if x.dtype == bool else x.view(_BITS[x.itemsize])


def _block(keys: Any, x: np.ndarray, mask: np.ndarray | None) -> tuple[int, ...]:
    """The shape of the weights that share an entry of the mask."""
    if mask is None:
        return (1,) * x.ndim
    fits = mask.dtype == bool and mask.ndim == x.ndim
    fits = fits and all(m and n % m == 0 for n, m in zip(x.shape, mask.shape, strict=True))
    if not (fits or (mask.shape == x.shape and mask.dtype == bool)):
        raise ValueError(
            f"the mask of {path_name(keys)} is {mask.dtype} of shape {mask.shape}, its parameter "
            f"has {x.shape}: pass a bool mask of the same shape, or of its tiles. Parameters in "
            "tiles are made dense with dstee.to_dense(params, tiles)."
        )
    return tuple(n // m if m else 1 for n, m in zip(x.shape, mask.shape, strict=True))


def to_boxes(x: np.ndarray, block: tuple[int, ...], extra: tuple[int, ...] = ()) -> np.ndarray:
    """An array as its blocks in row-major order, (blocks, *block, *extra)."""
    n = len(block)
    grid = [size // b for size, b in zip(x.shape[:n], block, strict=True)]
    apart = x.reshape([*(s for pair in zip(grid, block, strict=True) for s in pair), *extra])
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2), *range(2 * n, 2 * n + len(extra))]
    return apart.transpose(order).reshape(math.prod(grid), *block, *extra)


def _forms(active: np.ndarray) -> dict[str, np.ndarray]:
    """Where active blocks are, in each form that says it."""
    at = np.flatnonzero(active)
    between = np.diff(at, prepend=-1) - 1
    escapes = between // reader.ESCAPE
    gaps = np.full(len(at) + int(escapes.sum()), reader.ESCAPE, np.uint8)
    gaps[np.cumsum(escapes + 1) - 1] = between % reader.ESCAPE
    return {"bits": np.packbits(active, bitorder="little"), "gaps": gaps}


def _key(key: Any) -> Any:
    """A key of a path as JSON: a name, a position, or [key] for a dictionary's other keys."""
    if isinstance(key, jax.tree_util.SequenceKey):
        return key.idx
    if isinstance(key, jax.tree_util.DictKey) and not isinstance(key.key, str):
        return [key.key if isinstance(key.key, int) else str(key.key)]
    if isinstance(key, jax.tree_util.FlattenedIndexKey):
        return [key.key]
    return jax.tree_util.keystr((key,), simple=True)
