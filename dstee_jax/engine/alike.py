"""Leaves that are alike are exchanged as one: the program compiles once, not once a leaf."""

import re
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.exchange import Exchange
from dstee_jax.selection.parts import sharding_of

# From this many leaves on it pays to copy them into one array.
STACK_FROM = 8


def alike(names: list[str], rows: list[Exchange]) -> list[list[int]]:
    """Indices of the rows in groups that can be stacked: of one shape and, by name, one role.

    Numbers in a name do not count: 'layers/3/query' and 'layers/4/query' lie on devices in the
    same way; 'layers/3/out' may have their shape and lie in another, which would be gathered.
    """
    groups: dict[Hashable, list[int]] = {}
    for j, (name, row) in enumerate(zip(names, rows, strict=True)):
        arrays = [(x.shape, x.dtype, sharding_of(x)) for x in row[:3]]
        kind = (re.sub(r"\d+", "", name), *arrays, row.grid, row.k_max == 0, row.k_grow is None)
        groups.setdefault(kind, []).append(j)
    return [
        part
        for group in groups.values()
        for part in ([group] if len(group) >= STACK_FROM else [[j] for j in group])
    ]


def stacked(rows: list[Exchange]) -> Exchange:
    """Rows that are alike as one, each a part of its own."""
    if len(rows) == 1:
        return rows[0]
    grid = rows[0].grid
    parts = [n for n in grid if n > 1]

    def counts(each: list) -> jax.Array:
        return jnp.stack([jnp.broadcast_to(jnp.asarray(k), parts) for k in each])

    mask, drop, grow = (jnp.stack(column) for column in list(zip(*rows, strict=True))[:3])
    k_grow = None if rows[0].k_grow is None else counts([row.k_grow for row in rows])
    k = counts([row.k for row in rows])
    return Exchange(mask, drop, grow, (len(rows), *grid), k, k_grow, max(r.k_max for r in rows))


def unstacked(new: jax.Array, rows: list[Exchange], due: jax.Array | bool) -> list[jax.Array]:
    """The masks of rows that were stacked.

    Args:
      new: the mask of all of them.
      rows: the rows.
      due: True, perhaps traced. What comes out of a conditional is an array for XLA: a part of
        `new` it would take apart again wherever it is read, by a kernel for each leaf and reader.
    """
    if len(rows) == 1:
        return [new]
    if isinstance(due, bool):
        return list(new)
    return lax.cond(due, lambda: list(new), lambda: [mask & False for mask in new])
