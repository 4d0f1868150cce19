"""Read a file that `dstee_jax.save` wrote: one module that needs NumPy and safetensors alone.

    python reader.py FILE               # prints its leaves
    python reader.py FILE OUT.npz       # writes them dense, for numpy.load

Copy it to where JAX is not installed. With `ml_dtypes`, leaves of its types (bfloat16, float8,
int4) are arrays of them; without, they are the bits as unsigned integers, and `Leaf.dtype` says
what they are; `read(..., widen=True)` makes float32 of bfloat16. The format: docs/files.md.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

FORMAT, VERSION = "dstee_jax", 1
ESCAPE = 255  # a byte of gaps that stands for this many inactive entries and no active one
# Types that NumPy has, as the file calls them; values of others are stored as their bits.
CODES = {"bool": "BOOL"} | {
    f"{kind}{bits}": f"{code}{bits}"
    for kind, code in (("int", "I"), ("uint", "U"), ("float", "F"))
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("float", 8)
}


class FileError(ValueError):
    """A file is not a whole, unchanged file of this format. Nothing was loaded."""


class Leaf(NamedTuple):
    """How an array is stored.

    Attributes:
      path: its keys in the tree: str for a name, int for a position in a list, [key] for a
        dictionary's key that is no name.
      form: 'dense': the values in row-major order; 'bits' or 'gaps': the active ones, in
        row-major order of their blocks, and where these are, as `docs/files.md` says.
      shape: of the array.
      dtype: its type's name; also one that NumPy lacks, as 'bfloat16'.
      block: the shape of the blocks that are active or not: all ones, or a tile.
      masked: whether active means trained as active; else it means other than zero.
      active: how many blocks are stored.
      stored_as: the type of the stored values: `dtype`, or unsigned integers of its bits.
      checksum: CRC-32 of the stored bytes, the values first.
    """

    path: tuple[Any, ...]
    form: str
    shape: tuple[int, ...]
    dtype: str
    block: tuple[int, ...]
    masked: bool
    active: int
    stored_as: str
    checksum: int

    @property
    def name(self) -> str:
        """The path with slashes, as 'Dense_0/kernel'."""
        return "/".join(str(key[0] if isinstance(key, list) else key) for key in self.path)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each axis."""
        return tuple(n // size for n, size in zip(self.shape, self.block, strict=True))

    @property
    def size(self) -> int:
        """Entries of the array."""
        return _product(self.shape)

    @property
    def stored(self) -> int:
        """Entries that are stored."""
        return self.size if self.form == "dense" else self.active * _product(self.block)

    def tensors(self) -> tuple[str, ...]:
        """Names in the file: of the values, and of where they are."""
        if self.form == "dense":
            return (self.name,)
        return f"{self.name}.values", f"{self.name}.{self.form}"


class Contents(NamedTuple):
    """What a file holds; leaves in the order of the tree."""

    leaves: list[Leaf]
    arrays: list[np.ndarray]
    masks: list[np.ndarray | None]  # bool, of the array's shape; None for a leaf without one
    metadata: Any  # what was given to `save`


class Header(NamedTuple):
    """What a file says about itself."""

    leaves: list[Leaf]
    metadata: Any
    nbytes: list[int]  # of each leaf in the file


def read(path: str | os.PathLike, *, widen: bool = False) -> Contents:
    """All arrays of a file, dense, and the masks of those that have one.

    Args:
      path: of the file.
      widen: bfloat16 as float32, which has the same values.

    Raises:
      FileNotFoundError: there is no such file.
      FileError: it is truncated, changed, of something else or of a later version, or what it
        holds would not fit into this machine's memory.
    """
    with _opened(path) as file:
        leaves, metadata, _ = _header(path, file)
        _check_memory(path, leaves)
        decoded = [_decoded(path, leaf, file) for leaf in leaves]
    arrays = [
        _typed(leaf, values, widen) for leaf, (values, _) in zip(leaves, decoded, strict=True)
    ]
    return Contents(leaves, arrays, [mask for _, mask in decoded], metadata)


def header(path: str | os.PathLike) -> Header:
    """What a file says about itself, without its values. Raises as `read` does."""
    with _opened(path) as file:
        return _header(path, file)


def table(path: str | os.PathLike) -> str:
    """The leaves of a file as text: form, shape, type, density and bytes; and what dense takes."""
    leaves, metadata, nbytes = header(path)
    rows = [("leaf", "shape", "type", "form", "active", "bytes")]
    for leaf, size in zip(leaves, nbytes, strict=True):
        form = leaf.form
        if any(n > 1 for n in leaf.block):
            form += " of " + "x".join(map(str, leaf.block))
        active = "" if leaf.form == "dense" else f"{leaf.stored / max(leaf.size, 1):.2%}"
        shape = "x".join(map(str, leaf.shape))
        rows.append((leaf.name, shape, leaf.dtype, form, active, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    whole, dense = os.path.getsize(path), sum(_bytes(leaf) for leaf in leaves)
    lines.append(f"{whole:,} bytes in the file; dense {dense:,}: {dense / whole:.1f} times")
    return "\n".join([*lines, f"metadata: {json.dumps(metadata)}"])


def _opened(path: str | os.PathLike) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        return safe_open(os.fspath(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is no whole .safetensors file ({error}): it was truncated or changed, or is "
            "of another kind. Save or copy it again."
        ) from error


def _header(path: Any, file: Any) -> Header:
    said = file.metadata() or {}
    if said.get("format") != FORMAT:
        raise FileError(
            f"{path} was not written by {FORMAT}.save: read it with safetensors.numpy.load_file."
        )
    version = said.get("version", "")
    if not re.fullmatch("[0-9]{1,9}", version) or int(version) > VERSION:
        raise FileError(
            f"{path} has version {version!r} of the format, this reader knows versions up to "
            f"{VERSION}: update dstee_jax, or copy its newer reader.py."
        )
    texts = [said.get(name, "") for name in ("leaves", "metadata")]
    if said.get("checksum") != str(checksum(text.encode() for text in texts)):
        raise _changed(path, "its header does not have the checksum that it says")
    try:
        rows, metadata = map(json.loads, texts)
        leaves = [_leaf(path, row) for row in rows]
    except (TypeError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise _changed(path, f"its header is not that of a list of leaves ({error})") from error
    names = [name for leaf in leaves for name in leaf.tensors()]
    if sorted(names) != sorted(file.keys()):
        odd = sorted({*names} ^ {*file.keys()})[:3]
        raise _changed(path, f"the leaves that it lists are not the tensors that it has: {odd}")
    return Header(leaves, metadata, [_checked_bytes(path, leaf, file) for leaf in leaves])


def _leaf(path: Any, row: dict[str, Any]) -> Leaf:
    lists = {name: tuple(row[name]) for name in ("path", "shape", "block")}
    leaf = Leaf(**(row | lists))
    sizes = [*leaf.shape, *leaf.block, leaf.active, leaf.checksum]
    good = all(type(n) is int and n >= 0 for n in sizes)
    good = good and leaf.form in ("dense", "bits", "gaps") and len(leaf.block) == len(leaf.shape)
    good = good and all(b and n % b == 0 for n, b in zip(leaf.shape, leaf.block, strict=True))
    good = good and re.fullmatch("[a-z]+[0-9a-z_]*", leaf.dtype) is not None
    good = good and leaf.stored_as in CODES and 0 <= leaf.active <= _product(leaf.grid)
    if not good:
        raise _changed(path, f"it describes {leaf.name} as {leaf}")
    return leaf


def _checked_bytes(path: Any, leaf: Leaf, file: Any) -> int:
    """Bytes of a leaf in the file; its tensors must have the types and shapes that it says."""
    slices = [file.get_slice(name) for name in leaf.tensors()]
    shapes = [tuple(one.get_shape()) for one in slices]
    codes = [CODES[leaf.stored_as], "U8"][: len(slices)]
    wide = leaf.dtype == "complex128"  # two uint64 each
    expected = leaf.shape if leaf.form == "dense" else (leaf.active, *leaf.block)
    expected += (2,) * wide
    pattern = [(-(-_product(leaf.grid) // 8),)] if leaf.form == "bits" else shapes[1:]
    if [one.get_dtype() for one in slices] != codes or shapes != [expected, *pattern]:
        raise _changed(path, f"{leaf.name} has tensors of shapes {shapes}, not {expected}")
    itemsize = np.dtype(leaf.stored_as).itemsize
    return _product(shapes[0]) * itemsize + sum(map(_product, shapes[1:]))


def _check_memory(path: Any, leaves: Iterable[Leaf]) -> None:
    needed = sum(_bytes(leaf) + leaf.masked * leaf.size for leaf in leaves)
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not known on this system
        return
    if needed > there:
        raise FileError(
            f"{path} holds arrays of {needed:,} bytes when dense, this machine has {there:,} bytes "
            "of memory: read it on a larger one."
        )


def _decoded(path: Any, leaf: Leaf, file: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored type's dense array, and the mask of a leaf that has one."""
    values, *where = (file.get_tensor(name) for name in leaf.tensors())
    if checksum([values, *where]) != leaf.checksum:
        raise _changed(path, f"{leaf.name} does not have the checksum that it was saved with")
    if leaf.form == "dense":
        return values, np.ones(leaf.shape, bool) if leaf.masked else None
    grid = _product(leaf.grid)
    active = places(where[0]) if leaf.form == "gaps" else set_bits(where[0])
    if len(active) != leaf.active or (len(active) and active[-1] >= grid):
        raise _changed(path, f"{leaf.name} says where {len(active)} of {leaf.active} blocks are")
    extra = values.shape[1 + len(leaf.block) :]
    boxes = np.zeros((grid, *leaf.block, *extra), values.dtype)
    boxes[active] = values
    if not leaf.masked:
        return from_boxes(boxes, leaf.grid, leaf.block, extra), None
    mask = np.zeros((grid, *leaf.block), bool)
    mask[active] = True
    dense = from_boxes(boxes, leaf.grid, leaf.block, extra)
    return dense, from_boxes(mask, leaf.grid, leaf.block)


def from_boxes(
    boxes: np.ndarray, grid: tuple[int, ...], block: tuple[int, ...], extra: tuple[int, ...] = ()
) -> np.ndarray:
    """Blocks (blocks, *block, *extra) in row-major order of the grid as one array."""
    n = len(grid)
    apart = boxes.reshape([*grid, *block, *extra])
    order = [axis for pair in zip(range(n), range(n, 2 * n), strict=True) for axis in pair]
    order += range(2 * n, 2 * n + len(extra))
    shape = [size * b for size, b in zip(grid, block, strict=True)]
    return np.ascontiguousarray(apart.transpose(order)).reshape([*shape, *extra])


def places(gaps: np.ndarray) -> np.ndarray:
    """Where active blocks are, int64, in rising order, from the gaps between them, uint8."""
    if len(gaps) and gaps[-1] == ESCAPE:
        return np.full(1, np.iinfo(np.int64).max)  # nothing comes after the escape
    at = np.cumsum(np.where(gaps == ESCAPE, ESCAPE, gaps.astype(np.int64) + 1)) - 1
    return at[gaps != ESCAPE]


def set_bits(bits: np.ndarray) -> np.ndarray:
    """Where active blocks are, int64, in rising order, from a bit for each, lowest first."""
    return np.flatnonzero(np.unpackbits(bits, bitorder="little"))


def _typed(leaf: Leaf, values: np.ndarray, widen: bool) -> np.ndarray:
    """Stored values as the type that they are, where this machine knows it."""
    if leaf.dtype == leaf.stored_as:
        return values
    if widen and leaf.dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    dtype = _dtype(leaf.dtype)
    if dtype is None:
        return values
    return values.view(dtype).reshape(leaf.shape)


def _dtype(name: str) -> np.dtype | None:
    if name.startswith("complex"):
        return np.dtype(name)
    try:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    except (ImportError, AttributeError, TypeError):
        return None


def checksum(parts: Iterable[np.ndarray | bytes]) -> int:
    """CRC-32 of the bytes of arrays or texts, one after the other."""
    value = 0
    for part in parts:
        data: Any = part if isinstance(part, bytes) else np.ascontiguousarray(part)
        value = zlib.crc32(data, value)
    return value


def _bytes(leaf: Leaf) -> int:
    """Of the array when dense."""
    return leaf.size * np.dtype(leaf.stored_as).itemsize * (1 + (leaf.dtype == "complex128"))


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for n in sizes:
        product *= n
    return product


def _changed(path: Any, what: str) -> FileError:
    return FileError(f"{path} was changed or damaged: {what}. Save or copy it again.")


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        raise SystemExit("usage: python reader.py FILE [OUT.npz]")
    try:
        if len(argv) == 1:
            print(table(argv[0]))
        else:
            found = read(argv[0])
            named = {leaf.name: x for leaf, x in zip(found.leaves, found.arrays, strict=True)}
            np.savez(Path(argv[1]), **named)  # type: ignore[arg-type]
    except (OSError, FileError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
