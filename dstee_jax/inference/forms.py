"""Forms of a sparse kernel for `x @ form`, on a CPU, in NumPy and SciPy.

SciPy computes with the kernel transposed, (outputs, inputs), examples last: each weight then reads
and writes runs of memory. Its loops release the GIL, so that threads share the output units.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Form:
    """A kernel (inputs, outputs) that stands on the right of `@`.

    `x @ form` takes x of shape (..., inputs), NumPy's or JAX's, and gives NumPy's (..., outputs),
    both in the form's dtype. A ValueError names both shapes if they do not fit, or says that x is
    traced.

    Attributes:
      kind: which form: 'csr', 'csc', 'threads' or 'tiles'.
      shape: of the kernel, (inputs, outputs).
      dtype: of the kernel, at least float32.
      product: (examples, inputs) to (examples, outputs), both of that dtype.
    """

    kind: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    product: Callable[[np.ndarray], np.ndarray]

    __array_ufunc__ = None  # NumPy leaves x @ form to the form

    def __rmatmul__(self, x: Any) -> np.ndarray:
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"x of shape {x.shape} is traced, and {self!r} computes in NumPy: call the network "
                "outside jit, grad and vmap, or with the kernels that dstee.inference was given."
            )
        x = np.asarray(x, self.dtype)
        inputs, outputs = self.shape
        if x.shape[-1:] != (inputs,):
            raise ValueError(
                f"x of shape {x.shape} and a kernel of shape {self.shape} do not fit: the last "
                f"axis of x must have {inputs} entries."
            )
        *batch, _ = x.shape
        return self.product(x.reshape(math.prod(batch), inputs)).reshape(*batch, outputs)

    def __repr__(self) -> str:
        return f"Form({self.kind}, {self.shape[0]} x {self.shape[1]}, {self.dtype})"


def csr(kernel: np.ndarray) -> Form:
    """Its weights output by output: each output gathers what it reads."""
    from scipy.sparse import csr_array

    return _form("csr", kernel, functools.partial(_times, csr_array(kernel.T)))


def csc(kernel: np.ndarray) -> Form:
    """Its weights input by input: each input adds to what it feeds."""
    return _form("csc", kernel, functools.partial(_times, _by_input(kernel)))


def in_threads(kernel: np.ndarray, threads: int) -> Form:
    """As `csc`, with the outputs cut into parts of as many weights, one for each thread."""
    weights = np.cumsum(np.count_nonzero(kernel, axis=0))
    shares = weights[-1] * np.arange(1, threads) / threads
    cuts = [0, *np.searchsorted(weights, shares, side="right"), len(weights)]
    parts = [_by_input(kernel[:, a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    return _form("threads", kernel, functools.partial(_times_each, parts))


def tiles(kernel: np.ndarray, mask: np.ndarray) -> Form:
    """The active tiles of each column of tiles as one matrix, for what they read of the input.

    Args:
      kernel: zero where the mask is False.
      mask: bool, (rows of tiles, columns of tiles). Columns with fewer active tiles than others
        are filled up with inactive ones, which are zero.
    """
    rows, columns = mask.shape
    inputs, outputs = kernel.shape[0] // rows, kernel.shape[1] // columns
    active = int(mask.sum(0).max(initial=0))
    index = np.argsort(~mask, axis=0, kind="stable")[:active].T
    cut = kernel.reshape(rows, inputs, columns, outputs).transpose(2, 0, 1, 3)
    matrices = cut[np.arange(columns)[:, None], index].reshape(columns, active * inputs, outputs)
    return _form("tiles", kernel, functools.partial(_by_column, rows, index, matrices))


def _form(kind: str, kernel: np.ndarray, product: Callable[..., np.ndarray]) -> Form:
    inputs, outputs = kernel.shape
    return Form(kind, (inputs, outputs), kernel.dtype, product)


def _by_input(kernel: np.ndarray) -> Any:
    from scipy.sparse import csc_array

    return csc_array(kernel.T)


def _times(matrix: Any, x: np.ndarray) -> np.ndarray:
    return (matrix @ x[0])[None] if len(x) == 1 else (matrix @ x.T).T


def _times_each(parts: list[Any], x: np.ndarray) -> np.ndarray:
    x = x[0] if len(x) == 1 else np.ascontiguousarray(x.T)  # once, for all parts
    others = [_pool().submit(part.__matmul__, x) for part in parts[1:]]
    y = np.concatenate([part @ x for part in parts[:1]] + [other.result() for other in others])
    return y[None] if y.ndim == 1 else y.T


def _by_column(rows: int, index: np.ndarray, matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    examples, (columns, depth, outputs) = len(x), matrices.shape
    tiles = np.take(x.reshape(examples, rows, x.shape[1] // rows), index, axis=1)
    y = tiles.reshape(examples, columns, depth).swapaxes(0, 1) @ matrices
    return y.swapaxes(0, 1).reshape(examples, columns * outputs)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    """The threads of all forms; a forked process has none and starts its own."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "dstee_inference")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
