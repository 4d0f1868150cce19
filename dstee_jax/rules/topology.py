"""Scores from the mask alone: how many short paths join two units (Cannistraci-Hebb theory).

A kernel's mask is a bipartite graph between its inputs and its outputs. An inactive weight (u, v)
scores by the paths of three links from u to v, and these by how much their inner nodes keep to
the community around u and v. No gradient is read. For kernels of two axes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dstee_jax.rules.scores import Score
from dstee_jax.selection.parts import sharding_of
from dstee_jax.state import Leaf, at_least_float32


def ch2_l3n() -> Score:
    """CH2-L3n: each inner node of a path counts (links within + 1) / (links out of it + 1).

    With M the mask as a matrix of 0 and 1, C = M Mᵀ and E_ij = max(deg_j - C_ij - 1, 0),
    A = (C + 1[C != 0]) / (1 + E), and A' likewise from Mᵀ M: the score is A M + (A' Mᵀ)ᵀ. Entries
    that no path joins come last, at random among themselves.

    Returns:
      A score: leaf -> float32 array of the leaf's shape; for growth. Its cost is that of four
      products of the kernel's two sizes.

    Raises:
      ValueError: the leaf has not two axes.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> mask = jnp.array([[True, True], [True, False]])  # u1-v1-u2, and u1-v2: one path to u2-v2
      >>> leaf = dstee.Leaf(1.0 * mask, None, mask, mask, jax.random.key(0), 1)
      >>> ch2_l3n()(leaf)[1, 1].tolist()  # u1 and v1 have one link within each, none out
      4.0

    References:
      Muscoloni et al., "Adaptive network automata modelling of complex networks", 2020, for CH2-L3
      and CH3-L3. Zhang et al., "Epitopological learning
      and Cannistraci-Hebb network shape intelligence brain-inspired theory for ultra-sparse
      advantage in deep learning", 2024, and its successor with soft rules (CHTs), whose code
      the matrix form is from.

    Deviations:
      Entries without a path would tie at 0 and grow from the lowest index on.
    """
    return _by_paths(lambda common: common + (common != 0).astype(common.dtype))


def ch3_l3n() -> Score:
    """CH3-L3n: each inner node of a path counts 1 / (links out of the community + 1).

    As `ch2_l3n`, with A = 1[C != 0] / (1 + E).

    Returns, Raises, References, Deviations:
      As `ch2_l3n`.
    """
    return _by_paths(lambda common: (common != 0).astype(common.dtype))


def relative_importance() -> Score:
    """|w| over the sum of |w| of its input, plus |w| over the sum of |w| of its output.

    For removal: a weight that is large among those of its own units stays.

    Returns:
      A score: leaf -> float array of the leaf's shape, float32 or wider; 0 where w is.

    Raises:
      ValueError: the leaf has not two axes.

    References:
      Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
      Models", 2024, for the score; as in CHTs' code.
    """

    def score(leaf: Leaf) -> jax.Array:
        _check(leaf)
        size = jnp.abs(leaf.param).astype(at_least_float32(leaf.param.dtype))
        sums = [jnp.sum(size, axis=axis, keepdims=True) for axis in (0, 1)]
        shares = [size / jnp.where(total > 0, total, jnp.ones_like(total)) for total in sums]
        return shares[0] + shares[1]

    return score


def _by_paths(weight: Callable[[jax.Array], jax.Array]) -> Score:
    """The score whose inner nodes count weight(C) / (1 + E)."""

    def one_side(m: jax.Array) -> jax.Array:
        """Paths u-z1-z2-v by their inner nodes z2, on the side of u, the rows of m."""
        common = _product(m, m.T)
        degree = jnp.sum(m, axis=1)
        outside = jnp.maximum(degree[None, :] - common - 1, jnp.zeros_like(common))
        return _product(weight(common) / (1 + outside), m)

    def score(leaf: Leaf) -> jax.Array:
        _check(leaf)
        m = leaf.mask.astype(jnp.float32)
        found = one_side(m) + one_side(m.T).T
        place = sharding_of(leaf.mask)
        last = -jax.random.uniform(leaf.key, m.shape, jnp.float32, out_sharding=place)
        return jnp.where(found > 0, found, last)

    return score


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _check(leaf: Leaf) -> None:
    if leaf.mask.ndim != 2:
        raise ValueError(
            f"a leaf of shape {leaf.mask.shape} has not two axes, as the links between two sets of "
            "units have: leave convolutions dense, as where=lambda path, leaf: leaf.ndim == 2 and "
            "dstee.kernels(path, leaf)."
        )
