"""Top-KAST: a forward pass with the largest weights, a gradient for these and some more.

    sets = top_kast.sets(params, 0.9, 0.5)      # again every step, or every 100
    def loss(params, sets, batch):
        return model_loss(top_kast.apply(params, sets), batch) + top_kast.penalty(params, sets)

Forward with A, the largest |theta| of each leaf; gradients to B, which are A and the next largest,
so that a weight outside A can grow into it. In the end `sets.forward` are masks, which
`dstee.apply_masks` and `dstee.methods.static(masks=...)` take over.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dstee_jax.masks import distributions
from dstee_jax.masks.counts import Sparsity, StackAxes, Where
from dstee_jax.masks.distributions import Distribution
from dstee_jax.masks.given import check_masks
from dstee_jax.masks.largest import largest_masks
from dstee_jax.masks.where import kernels
from dstee_jax.reparameterised.straight_through import through
from dstee_jax.state import at_least_float32
from dstee_jax.trees import PyTree, is_dense, mask_leaves


class Sets(NamedTuple):
    """Which weights take part: masks, with the structure of the parameters."""

    forward: PyTree  # A: bool, True where the network sees the weight
    backward: PyTree  # B: bool, True where the weight gets a gradient; A is part of it


def sets(
    params: PyTree,
    sparsity: Sparsity,
    backward_sparsity: Sparsity,
    *,
    distribution: Distribution = distributions.uniform,
    where: Where = kernels,
    stack_axes: StackAxes | None = None,
) -> Sets:
    """A and B: the largest |theta| of each leaf at two sparsities.

    Args:
      params: pytree of arrays.
      sparsity: of A, in [0, 1), or a dict from path to sparsity.
      backward_sparsity: of B, at most that of A; 0.5 beside 0.9 is the usual example.
      distribution: how each is shared among the leaves; the method has the same in each.
      where: `(path, leaf) -> bool`, which leaves are sparse.
      stack_axes: as for `dstee.transform`.

    Returns:
      Masks with exact counts; ties go to the lowest index.

    Raises:
      ValueError: B would be sparser than A, `where` selects no leaf, or a leaf would keep no
        weight.

    Example:
      >>> import jax.numpy as jnp
      >>> found = sets({"kernel": jnp.array([[4.0, -3.0], [2.0, 1.0]])}, 0.75, 0.5)
      >>> found.forward["kernel"].tolist(), found.backward["kernel"].tolist()
      ([[True, False], [False, False]], [[True, True], [False, False]])

    References:
      Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, Section 2.

    Deviations:
      The authors' code was not found: this follows sparseml's and torch_topkast's. At which step
      the paper stops exploring is not known; pass `backward_sparsity=sparsity` from there on.
    """
    if (
        not isinstance(sparsity, Mapping)
        and not isinstance(backward_sparsity, Mapping)
        and backward_sparsity > sparsity
    ):
        raise ValueError(
            f"backward_sparsity={backward_sparsity} is above sparsity={sparsity}: the gradient "
            "goes to at least the weights of the forward pass."
        )
    size = jax.lax.stop_gradient(jax.tree.map(jnp.abs, params))
    largest = functools.partial(
        largest_masks, size, distribution=distribution, where=where, stack_axes=stack_axes
    )
    forward, backward = largest(sparsity), largest(backward_sparsity)
    # A leaf that a distribution gives fewer weights in B still has all of A there.
    return Sets(forward, jax.tree.map(jnp.logical_or, forward, backward))


def apply(params: PyTree, sets: Sets) -> PyTree:
    """The parameters in A, zero elsewhere; their gradient goes to B.

    Args:
      params: pytree of arrays, theta.
      sets: from `sets`.

    Returns:
      The structure of `params`; exactly zero outside A.

    Raises:
      ValueError: the masks do not fit.

    Deviations:
      A weight outside B has a zero gradient, which an optimizer's momentum or weight decay may
      still move; the network does not see it.
    """
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(
        treedef, [w if is_dense(a) else _forward(w, a, b) for w, a, b in _rows(params, sets)]
    )


def penalty(params: PyTree, sets: Sets, coefficient: float = 1e-4) -> jax.Array:
    """What is added to the loss: coefficient (sum of |theta| in A + 1/D that in B without A).

    D is the share of a leaf that is in A. The second term is larger, so that a weight must earn
    its place in A.

    Args:
      params: pytree of arrays, theta.
      sets: from `sets`.
      coefficient: 0 or more.

    Returns:
      float32 (or wider), shape ().

    Raises:
      ValueError: the masks do not fit, or the coefficient is negative.

    References:
      Jayakumar et al., 2020, Section 2.3.

    Deviations:
      The absolute value, as in the two programs named under `sets`.
    """
    if not coefficient >= 0:
        raise ValueError(f"coefficient={coefficient} must be 0 or more: 0 is no penalty.")
    terms = [_size(w, a, b) for w, a, b in _rows(params, sets) if not is_dense(a)]
    return coefficient * functools.reduce(jnp.add, terms, jnp.zeros((), jnp.float32))


def _rows(params: PyTree, sets: Sets) -> list[tuple[jax.Array, Any, Any]]:
    """Each leaf with its A and its B."""
    for masks in sets:
        check_masks(masks, params)
    both = [mask_leaves(masks, params) for masks in sets]
    return list(zip(jax.tree.leaves(params), *both, strict=True))


def _forward(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b, through(w, a), jnp.zeros_like(w))


def _size(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The penalty of a leaf, without its coefficient."""
    size = jnp.abs(w).astype(at_least_float32(w.dtype))
    density = jnp.mean(a, dtype=size.dtype)
    return jnp.sum(size, where=a) + jnp.sum(size, where=b & ~a) / density
