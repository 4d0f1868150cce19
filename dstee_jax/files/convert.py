"""Parameters in forms that other programs read: SciPy's, JAX's BCSR, dense .safetensors."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import sparse

from dstee_jax.files import reader
from dstee_jax.files.save import host_array, write_whole
from dstee_jax.masks.where import kernels as is_kernel
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_parts

# Types that the .safetensors format has.
_TYPES = {*reader.CODES, "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2"}


def to_scipy(kernel: Any, mask: Any | None = None) -> Any:
    """A kernel as `scipy.sparse.csr_array`, of its active weights.

    Args:
      kernel: shape (in, out), as in `x @ kernel`.
      mask: bool, the kernel's shape: what it has as active is kept, zeros among it; without one,
        what is not zero.

    Returns:
      A CSR array of the kernel's shape, column indices in order; float16, bfloat16 and float8
      become float32, since SciPy computes with none of them. `x @ csr` is NumPy's.

    Raises:
      ValueError: the kernel does not have two axes, or the mask does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> csr = to_scipy(jnp.array([[0., 2.], [0., 0.], [1., 3.]]))
      >>> csr.nnz, csr.data.tolist(), csr.indices.tolist(), csr.indptr.tolist()
      (3, [2.0, 1.0, 3.0], [1, 0, 1], [0, 1, 1, 3])
    """
    from scipy.sparse import csr_array

    data, indices, indptr = _rows(kernel, mask)
    narrow = data.dtype.kind not in "biufc" or data.dtype == np.float16
    return csr_array((data.astype(np.float32) if narrow else data, indices, indptr), kernel.shape)


def to_bcsr(kernel: Any, mask: Any | None = None) -> sparse.BCSR:
    """A kernel as `jax.experimental.sparse.BCSR`, of its active weights, in its own type.

    JAX multiplies a BCSR from the left alone: `x @ kernel` is `(to_bcsr(kernel.T) @ x.T).T`.

    Args:
      kernel: shape (in, out).
      mask: bool, the kernel's shape: what it has as active is kept; without one, what is not zero.

    Raises:
      ValueError: the kernel does not have two axes, or the mask does not fit.
    """
    data, indices, indptr = map(jax.numpy.asarray, _rows(kernel, mask))
    return sparse.BCSR((data, indices, indptr), shape=kernel.shape)


def _rows(kernel: Any, mask: Any | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, column indices and where each row begins, as CSR has them."""
    x = np.asarray(kernel)
    if x.ndim != 2:
        raise ValueError(
            f"the kernel has shape {x.shape}, and CSR has two axes: reshape a convolution's to "
            "(height * width * in, out)."
        )
    active = x != 0 if mask is None else np.asarray(mask)
    if active.shape != x.shape or active.dtype != bool:
        raise ValueError(
            f"the mask is {active.dtype} of shape {active.shape}, the kernel has {x.shape}: pass "
            "a bool mask of the same shape."
        )
    at = np.nonzero(active)
    ends = np.cumsum(active.sum(1, dtype=np.int32), dtype=np.int32)
    return x[at], at[1].astype(np.int32), np.concatenate([np.zeros(1, np.int32), ends])


def save_dense(
    path: str | os.PathLike,
    params: PyTree,
    *,
    kernels: Literal["in_out", "out_in"] = "in_out",
    where: Callable[[Any, Any], bool] = is_kernel,
    separator: str = ".",
) -> None:
    """Save parameters as a dense .safetensors file, which PyTorch and others read as it is.

    Args:
      path: of the file; it is complete or not there at all, as `save`'s.
      params: pytree of arrays; bfloat16, float8_e4m3fn and float8_e5m2 stay what they are.
      kernels: the order of a kernel's axes in the file: 'in_out' as JAX has them, (..., in, out);
        'out_in' as PyTorch has them, (out, in, ...). The file's metadata says which, and
        which tensors were turned.
      where: which leaves are kernels, as `transform` takes it: others are never turned.
      separator: between the keys of a path, in the names of tensors.

    Raises:
      ValueError: a leaf has a type that the format lacks, or two have one name; names it.
    """
    if kernels not in ("in_out", "out_in"):
        raise ValueError(f"kernels={kernels!r} must be 'in_out' (JAX) or 'out_in' (PyTorch).")
    tensors: dict[str, np.ndarray] = {}
    turned = []
    for at, leaf in leaves_with_path(params):
        if is_dense(leaf):
            continue
        name, x = separator.join(path_parts(at)), host_array(at, leaf)
        if str(x.dtype) not in _TYPES:
            raise ValueError(
                f"{name} has type {x.dtype}, which .safetensors does not have: convert it, or keep "
                "it with dstee.save."
            )
        if name in tensors:
            raise ValueError(f"two leaves are called {name}: pass another separator={separator!r}.")
        if kernels == "out_in" and where(at, leaf):
            x = x.transpose(-1, -2, *range(x.ndim - 2))
            turned.append(name)
        tensors[name] = np.ascontiguousarray(x).reshape(x.shape)
    write_whole(Path(path), tensors, {"kernels": kernels, "turned": json.dumps(turned)})
