"""Scores from the mask alone: how many short paths join two units (Cannistraci-Hebb theory).

A kernel's mask is a bipartite graph between its inputs and its outputs. An inactive weight (u, v)
scores by the paths of three links from u to v, and these by how much their inner nodes keep to
the community around u and v. No gradient is read. For kernels of two axes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dstee_jax.rules.scores import Score
from dstee_jax.selection.parts import laid_as, sharding_of, whole
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
    return _by_nodes(lambda common: common + (common != 0).astype(common.dtype))


def ch3_l3n() -> Score:
    """CH3-L3n: each inner node of a path counts 1 / (links out of the community + 1).

    As `ch2_l3n`, with A = 1[C != 0] / (1 + E).

    Returns, Raises, References, Deviations:
      As `ch2_l3n`.
    """
    return _by_nodes(lambda common: (common != 0).astype(common.dtype))


def ch3_l3p() -> Score:
    """CH3-L3p: each path counts 1 / sqrt((1 + e1) (1 + e2)), e the links of its inner nodes out.

    e of an inner node z: its links but the one to u or v and those to other inner nodes of paths
    from u to v. The score is the sum over all paths u - z1 - z2 - v.

    Returns:
      A score: leaf -> float32 array of the leaf's shape; for growth. Of a kernel of m by n it costs
      m^2 n^2 multiply-adds, input by input: of 784 by 300 some 5e10.

    Raises:
      ValueError: the leaf has not two axes.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp
      >>> mask = jnp.array([[True, True, True], [True, False, False]])
      >>> leaf = dstee.Leaf(1.0 * mask, None, mask, mask, jax.random.key(0), 1)
      >>> round(float(ch3_l3p()(leaf)[1, 1]), 4)  # one path; one link leads out of its u1
      0.7071

    References:
      As `ch2_l3n`; of the latter two, the MLPs.

    Deviations:
      Entries without a path would tie at 0 and grow from the lowest index on.
    """

    def found(m: jax.Array) -> jax.Array:
        out_of_rows, out_of_columns = (1 / jnp.sqrt(1 + _outside(x)) for x in (m, m.T))

        def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            links, weight = row  # of u to z1; of z2 as seen from u
            by_z2 = _product(m * links[None, :], out_of_columns.T)  # of z2 and v, over z1
            return jnp.sum(weight[:, None] * m * by_z2, axis=0)

        return jax.lax.map(of_row, (m, out_of_rows))

    return _by_paths(found)


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


def _by_nodes(weight: Callable[[jax.Array], jax.Array]) -> Score:
    """The score whose inner nodes count weight(C) / (1 + E)."""

    def one_side(m: jax.Array) -> jax.Array:
        """Paths u-z1-z2-v by their inner nodes z2, on the side of u, the rows of m."""
        return _product(weight(_product(m, m.T)) / (1 + _outside(m)), m)

    return _by_paths(lambda m: one_side(m) + one_side(m.T).T)


def _outside(m: jax.Array) -> jax.Array:
    """How many links of a row's node (second axis) lead to no neighbour of another's (first axis).

    But for one, which is that to the end of a path.
    """
    common = _product(m, m.T)
    degree = jnp.sum(m, axis=1)
    return jnp.maximum(degree[None, :] - common - 1, jnp.zeros_like(common))


def _by_paths(of_mask: Callable[[jax.Array], jax.Array]) -> Score:
    """A score from the mask as a matrix of 0 and 1; what scores 0 comes last, at random."""

    def score(leaf: Leaf) -> jax.Array:
        _check(leaf)
        m = whole(leaf.mask).astype(jnp.float32)
        found = laid_as(of_mask(m), leaf.mask)
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
