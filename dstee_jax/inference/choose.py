"""`inference`: each sparse kernel in the form whose product is fastest on this machine."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dstee_jax.inference.forms import csc, csr, in_threads, tiles
from dstee_jax.inference.timing import medians
from dstee_jax.masks.given import by_leaf, check_masks, of_weights
from dstee_jax.masks.where import kernels
from dstee_jax.trees import PyTree, expanded, is_dense, leaves_with_path

FORMS = ("dense", "csr", "csc", "threads", "tiles")
GAIN = 1.2  # what another form must gain over dense: less is within the noise of timing


def inference(
    params: PyTree,
    masks: PyTree = None,
    batch: int = 1,
    *,
    forms: Sequence[str] = FORMS,
    threads: int | None = None,
    repeats: int = 5,
) -> PyTree:
    """Parameters for fast products on a CPU: sparse kernels in their fastest form for `x @ form`.

    For a trained network that is called with one example or a few. Each sparse kernel of two axes
    is timed on random examples, in turn, and the fastest is kept: 'dense' in NumPy, SciPy's sparse
    arrays by output ('csr'), by input ('csc') or by input in 'threads', and, where masks are of
    tiles, the active 'tiles' alone. The network is then plain NumPy, outside `jit`::

      h = np.maximum(x @ params["up"]["kernel"] + params["up"]["bias"], 0)

    What is chosen holds for this machine and this batch; other batches are computed as well, only
    perhaps not as fast. Measure on an idle machine: it takes about a second a kernel.

    Args:
      params: pytree of arrays, dense kernels (inputs, outputs); of Flax NNX
        `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.
      masks: with the structure of `params`, as `SparseState.masks`: bool arrays, of the weights or
        of tiles (each axis divides the parameter's), `optax.MaskedNode()` for dense leaves; or an
        optimizer state that holds them. None: what is not zero is active, in the leaves that
        `dstee.kernels` selects.
      batch: examples in a call.
      forms: that may be taken; one alone is taken without being timed, and where none of them
        is possible (no tiles, one thread) a kernel is dense.
      threads: that may share a product; None: as many as the process has CPUs.
      repeats: turns of each form, of three timed calls after a pause and a call that is not timed.

    Returns:
      `params` in NumPy. A sparse kernel is an object with `kind`, `shape` and `dtype` that takes
      x of shape (..., inputs), NumPy's or JAX's, and gives NumPy's (..., outputs), the inactive
      weights taken as zero; if dense is fastest, the masked kernel is an array like all the
      others. Convolutions and stacked kernels are masked arrays, too. Floating arrays narrower
      than float32 are widened to it: neither SciPy nor NumPy computes fast in them.

    Raises:
      ValueError: masks do not fit, a form is none of these, or batch, threads or repeats are
        below 1; names the value.

    Example:
      >>> import dstee_jax as dstee, jax, numpy as np
      >>> kernel = jax.random.normal(jax.random.key(0), (64, 32))
      >>> mask = jax.random.bernoulli(jax.random.key(1), 0.1, (64, 32))
      >>> fast = dstee.inference({"kernel": kernel}, {"kernel": mask})
      >>> x = np.ones((3, 64), np.float32)
      >>> np.allclose(x @ fast["kernel"], x @ (kernel * mask), atol=1e-4)
      True
    """
    threads = _cpus() if threads is None else threads
    for name, value in (("batch", batch), ("threads", threads), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if not set(forms) <= set(FORMS) or isinstance(forms, str):
        raise ValueError(f"forms={forms!r} must be some of {FORMS}, as ('dense', 'csr').")
    leaves, treedef = jax.tree.flatten(params)
    x = np.random.default_rng(0).standard_normal

    def one(leaf: Any, mask: Any) -> Any:
        kernel = _array(leaf)
        if is_dense(mask):
            return kernel
        kernel = _masked(kernel, np.asarray(mask))
        if kernel.ndim != 2 or not kernel.size or not jnp.issubdtype(kernel.dtype, jnp.floating):
            return kernel
        examples = x((batch, kernel.shape[0])).astype(kernel.dtype)
        possible = candidates(kernel, of_tiles(np.asarray(mask)), threads, forms)
        return _fastest(possible, examples, repeats)

    pairs = zip(leaves, _masks_of(masks, params), strict=True)
    return jax.tree.unflatten(treedef, [one(leaf, mask) for leaf, mask in pairs])


def of_tiles(mask: np.ndarray) -> np.ndarray:
    """The mask of the largest tiles that a mask of weights is made of; itself if of none.

    Tiles of 8 to 128 outputs and 1 to 128 inputs, powers of two: as `load` gives masks of tiles.
    """
    columns = _joined(mask, 1, smallest=8)
    return mask if columns is mask else _joined(columns, 0, smallest=2)


def _joined(mask: np.ndarray, axis: int, smallest: int) -> np.ndarray:
    """A mask with one entry for each run of equal ones along an axis, of the longest that fits."""
    for size in (128, 64, 32, 16, 8, 4, 2):
        length = mask.shape[axis]
        if size < smallest or length % size:
            continue
        before, after = mask.shape[:axis], mask.shape[axis + 1 :]
        runs = mask.reshape(*before, length // size, size, *after)
        some = np.asarray(runs.any(axis + 1))
        if (some == runs.all(axis + 1)).all():
            return some
    return mask


def candidates(
    kernel: np.ndarray, mask: np.ndarray, threads: int, forms: Sequence[str] = FORMS
) -> list[Any]:
    """The possible forms of a kernel.

    Args:
      kernel: (inputs, outputs), zero where the mask is False.
      mask: bool, of the weights or of tiles.
      threads, forms: as for `inference`.
    """
    makers: dict[str, Callable[[], Any]] = {
        "dense": lambda: kernel,
        "csr": lambda: csr(kernel),
        "csc": lambda: csc(kernel),
        "threads": lambda: in_threads(kernel, threads),
        "tiles": lambda: tiles(kernel, mask),
    }
    impossible = {"threads"} if threads == 1 else set()
    if mask.shape == kernel.shape:
        impossible.add("tiles")
    return [make() for name, make in makers.items() if name in {*forms} - impossible] or [kernel]


def _fastest(forms: list[Any], x: np.ndarray, repeats: int) -> Any:
    if len(forms) == 1:
        return forms[0]

    def product(form: Any) -> Callable[[], Any]:
        return lambda: x @ form

    times = medians([product(form) for form in forms], repeats)
    times = [
        t / GAIN if isinstance(form, np.ndarray) else t
        for form, t in zip(forms, times, strict=True)
    ]
    return forms[times.index(min(times))]


def _masks_of(masks: PyTree, params: PyTree) -> list[Any]:
    """A mask, of weights or of tiles, or `MaskedNode` for each leaf of params; checked."""
    if masks is None:
        pairs = [(path, leaf) for path, leaf in leaves_with_path(params) if not is_dense(leaf)]
        return [_zeros(leaf) if kernels(path, leaf) else optax.MaskedNode() for path, leaf in pairs]
    found = by_leaf(masks, params)
    of_params = jax.tree.unflatten(jax.tree.structure(params), found)
    check_masks(of_weights(of_params, params), params)
    return found


def _zeros(leaf: Any) -> Any:
    """The mask of what is not zero; `MaskedNode` if nothing is."""
    mask = np.asarray(leaf) != 0
    return optax.MaskedNode() if mask.all() else mask


def _masked(kernel: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(expanded(mask, kernel.shape), kernel, np.zeros((), kernel.dtype))


def _array(leaf: Any) -> np.ndarray:
    """In NumPy, at least float32 if floating."""
    x = np.asarray(leaf)
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(np.float32) if narrow else x


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
