"""Exact selection of the k largest entries, bit by bit, with counting passes.

The cost does not depend on k, k may be traced, and on sharded arrays only counts travel.
Several arrays may be searched as one, one array part by part, and many searches in one loop.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dstee_jax.selection.parts import by_part, is_sharded, sharding_of, varying_axes

INDEX = jnp.uint32  # of counts and indices: up to 2**32 - 1 entries of a part

# Bytes of keys that are searched in one loop, where nothing is split over devices. A loop goes on
# for the array of it that takes longest, as one with ties does, and reads all of them in each
# pass, up to here from a CPU's caches. An array is never cut for it.
CACHED = 2**24


def ordered_bits(score: jax.Array) -> jax.Array:
    """Map floats to unsigned integers of the same order (float32 -> uint32)."""
    unsigned = jnp.uint64 if score.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(score, unsigned)
    sign = jnp.array(1 << (8 * bits.dtype.itemsize - 1), unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def linear_index(shape: tuple[int, ...], axes: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Row-major index along `axes`, built without a reshape (which would gather)."""
    sharding = sharding_of(like)
    index = jnp.zeros(shape, INDEX, out_sharding=sharding)
    stride = 1
    for axis in reversed(axes):
        along = lax.broadcasted_iota(INDEX, shape, axis, out_sharding=sharding)
        index += along * jnp.array(stride, INDEX)
        stride *= shape[axis]
    return index


def count(
    axes: tuple[int, ...], *predicates: jax.Array, sharded: bool = False
) -> tuple[jax.Array, ...]:
    """How many entries of each bool array are True along axes: one pass over all of them.

    One variadic reduce, which XLA vectorises on CPU where it does not a plain sum of bools: one
    array is counted in two halves. Between devices it would be an all-gather of every device's
    counts; so axes that are split are summed by themselves, which is an all-reduce. Explicit
    mesh axes are seen in the type; for Auto ones `sharded` says it, and all sums are plain.
    """
    if len(predicates) == 1 and axes and not sharded:
        (single,) = predicates
        place = lax.broadcasted_iota(
            INDEX, single.shape, axes[-1], out_sharding=sharding_of(single)
        )
        odd = (place & jnp.ones((), INDEX)).astype(bool)
        return (functools.reduce(jnp.add, count(axes, single & odd, single & ~odd)),)
    ones = tuple(p.astype(INDEX) for p in predicates)
    spec = jax.typeof(ones[0]).sharding.spec
    apart = axes if sharded else tuple(axis for axis in axes if spec[axis] is not None)
    within = tuple(axis for axis in axes if axis not in apart)

    def add(x: tuple, y: tuple) -> tuple:
        return tuple(a + b for a, b in zip(x, y, strict=True))

    if within:
        ones = tuple(lax.reduce(ones, (jnp.zeros((), INDEX),) * len(ones), add, within))
    left = tuple(axis - sum(w < axis for w in within) for axis in apart)
    return tuple(jnp.sum(x, axis=left, dtype=INDEX) for x in ones) if left else ones


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bits", "side"),
    meta_fields=("inner", "size", "sharded"),
)
@dataclasses.dataclass(frozen=True)
class Keys:
    """One array of unsigned keys, cut into parts.

    With `side`, each part is two: what is False and what is True there, whose entries lie among
    each other. What is said of each part then has a first axis of those two.
    """

    bits: jax.Array  # `parts.split` of the array
    inner: tuple[int, ...]  # its axes within a part
    size: int  # entries of a part
    sharded: bool = False  # whether it is split over Auto mesh axes
    side: jax.Array | None = None  # bool, as `bits`

    def entries(self, test: Callable[..., jax.Array], *per_part: jax.Array) -> jax.Array:
        """Which entries pass a test against the values of their part: bool, as the bits."""
        if self.side is None:
            return test(*map(self._broadcast, per_part))
        off, on = (test(*(self._broadcast(v[i]) for v in per_part)) for i in (0, 1))
        return (off & ~self.side) | (on & self.side)

    def reaching(self, thresholds: jax.Array) -> jax.Array:
        """How many entries of each part are at least each of some thresholds, the first axis."""
        at_least = functools.partial(jnp.greater_equal, self.bits)
        if self.side is None:
            entries = [at_least(self._broadcast(t)) for t in thresholds]
        else:
            # Each side by its own threshold: a select of the two would be computed entry by entry.
            entries = [
                at_least(self._broadcast(t[i])) & side
                for t in thresholds
                for i, side in enumerate((~self.side, self.side))
            ]
        counts = count(self.inner, *entries, sharded=self.sharded)
        if self.side is not None:
            counts = tuple(jnp.stack(pair) for pair in zip(counts[::2], counts[1::2], strict=True))
        return jnp.stack(counts)

    def _broadcast(self, per_part: jax.Array) -> jax.Array:
        return jnp.expand_dims(per_part, self.inner) if per_part.ndim else per_part


class Search(NamedTuple):
    """The k largest of some keys, in each part for itself."""

    keys: Sequence[Keys]  # cut into the same parts, and searched as one array
    # INDEX, with an axis for each axis that counts parts, and before them one of two if the keys
    # have a side (False first). At most the entries that there are.
    k: jax.Array

    @property
    def size(self) -> int:
        """Entries of a part, of all keys together."""
        return sum(key.size for key in self.keys)


class Found(NamedTuple):
    """For each part of a search: a threshold that at least k entries reach, and no smaller set."""

    threshold: jax.Array
    reached: jax.Array  # INDEX: how many entries are at least the threshold
    above: jax.Array  # INDEX: how many are above it; exact unless reached == k


def chosen(searches: Sequence[Search]) -> list[list[jax.Array]]:
    """Masks of the k largest entries of each search (in each part of it).

    In one loop for all that are known to be split over devices, whose counts then travel together;
    else in one for as many as caches hold. Keys of another dtype begin another loop.

    Args:
      searches: each of keys of one dtype.

    Returns:
      For each search a bool array for each of its keys, shaped as its bits. Ties go to the first
      array and the lowest row-major index of the part.
    """
    searches = [s._replace(k=by_part(s.k, s.keys[0].bits, s.keys[0].inner)) for s in searches]
    alike = itertools.groupby(searches, key=lambda search: search.keys[0].bits.dtype)
    groups = [group for _, same in alike for group in _loops(list(same))]
    return [masks for group in groups for masks in _chosen(group)]


def _loops(searches: Sequence[Search]) -> list[list[Search]]:
    """Searches that share a loop, of some of one dtype, in order."""
    if any(key.sharded or is_sharded(key.bits) for s in searches for key in s.keys):
        return [list(searches)]
    groups: list[list[Search]] = []
    left = 0
    for search in searches:
        size = sum(key.bits.size * key.bits.dtype.itemsize for key in search.keys)
        if not groups or size > left:
            groups.append([])
            left = CACHED
        groups[-1].append(search)
        left -= size
    return groups


def _chosen(searches: list[Search]) -> list[list[jax.Array]]:
    found = _bisect(searches, bits=8 * searches[0].keys[0].bits.dtype.itemsize)

    def lowest_index() -> list[jax.Array]:
        ties = [_ties(*row) for row in zip(searches, found, strict=True)]
        highest = max(search.size for search in searches) + 1  # above every rank, for k = 0
        bits = min(highest.bit_length(), jnp.iinfo(INDEX).bits)
        return [f.threshold for f in _bisect(ties, bits)]

    unique = ~_any([jnp.any(f.reached != s.k) for s, f in zip(searches, found, strict=True)])
    first = lax.cond(unique, lambda: [jnp.zeros_like(f.above) for f in found], lowest_index)
    return [_at_least(*row) for row in zip(searches, found, first, strict=True)]


def _bisect(searches: Sequence[Search], bits: int) -> list[Found]:
    """Find the k-th largest entry of each part of each search, of all searches in one loop.

    Fixes two bits a pass, from the top, and stops early once exactly k entries are reached
    everywhere. On devices the counts of all searches travel together.

    Args:
      searches: of keys of one dtype.
      bits: of the keys, the lowest ones of their dtype; the others are zero.

    Returns:
      For each search: `reached == k`, or `reached > k` and `threshold` is the k-th largest value,
      whose ties are still to be broken.
    """

    def unfinished(carry: tuple[jax.Array, list[Found]]) -> jax.Array:
        shift, found = carry
        missing = [jnp.any(f.reached != s.k) for s, f in zip(searches, found, strict=True)]
        return (shift >= 0) & _any(missing)

    def two_bits(carry: tuple[jax.Array, list[Found]]) -> tuple[jax.Array, list[Found]]:
        shift, found = carry
        return shift - 2, [_narrow(*row, shift) for row in zip(searches, found, strict=True)]

    first = jnp.int32(bits + bits % 2 - 2)
    return lax.while_loop(unfinished, two_bits, (first, list(map(_start, searches))))[1]


# Traced once for all searches of one shape, as are the others below that are jitted.
@jax.jit
def _narrow(search: Search, found: Found, shift: jax.Array) -> Found:
    """A threshold with two more bits, at `shift`."""
    dtype = found.threshold.dtype
    step = jnp.left_shift(jnp.array(1, dtype), shift.astype(dtype))
    steps = step * jnp.arange(1, 4, dtype=dtype).reshape(3, *[1] * found.threshold.ndim)
    reaching = [key.reaching(found.threshold[None] + steps) for key in search.keys]
    counts = functools.reduce(jnp.add, reaching)
    enough = counts >= search.k[None]  # the lower a threshold is, the more entries reach it
    return Found(
        found.threshold + step * enough.sum(0, dtype=dtype),
        jnp.where(enough, counts, found.reached[None]).min(0),
        jnp.where(enough, found.above[None], counts).max(0),
    )


def _start(search: Search) -> Found:
    """The threshold zero, which all entries reach.

    A side has fewer. The threshold stays zero there only where all that tie are taken.

    In the type of what is counted: under shard_map, varying over the same mesh axes.
    """
    axes = functools.reduce(lambda a, b: a | b, [varying_axes(key.bits) for key in search.keys])

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    zeros = vary(jnp.zeros_like(search.k))
    everything = vary(jnp.full_like(search.k, search.size))
    return Found(zeros.astype(search.keys[0].bits.dtype), everything, zeros)


@jax.jit
def _ties(search: Search, found: Found) -> Search:
    """For as many of the entries at the threshold as are missing; lower indices are larger."""

    def ranked(key: Keys, rank: jax.Array) -> Keys:
        tied = key.entries(functools.partial(jnp.equal, key.bits), found.threshold)
        return dataclasses.replace(key, bits=rank * tied.astype(INDEX))

    # A part without ties has its k already (then `above` may not be exact): all its entries.
    everything = jnp.full_like(search.k, search.size)
    left = jnp.where(found.reached == search.k, everything, search.k - found.above)
    return Search([ranked(*row) for row in zip(search.keys, _ranks(search), strict=True)], left)


def _ranks(search: Search) -> list[jax.Array]:
    """For each array of a search, how many entries of a part come after one, itself included."""
    left, ranks = search.size, []
    for key in search.keys:
        index = linear_index(key.bits.shape, key.inner, key.bits)
        ranks.append(jnp.array(left, INDEX) - index)
        left -= key.size
    return ranks


@jax.jit
def _at_least(search: Search, found: Found, first: jax.Array) -> list[jax.Array]:
    """The entries above the threshold, and of those at it the ones of rank `first` or more."""

    def reached(bits: jax.Array, rank: jax.Array) -> Callable[..., jax.Array]:
        return lambda at, first: (bits > at) | ((bits == at) & (rank >= first))

    rows = zip(search.keys, _ranks(search), strict=True)
    return [key.entries(reached(key.bits, rank), found.threshold, first) for key, rank in rows]


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags)


def _whole(array: jax.Array) -> Keys:
    return Keys(array, tuple(range(array.ndim)), array.size)


def largest_bits(keys: Sequence[jax.Array], k: jax.Array) -> list[jax.Array]:
    """Masks of the k largest entries of several unsigned arrays together, by bisection.

    Args:
      keys: uint32 (or uint64) arrays of any shapes, at most 2**32 - 1 entries in all.
      k: how many, an integer scalar from 0 to the number of entries; may be traced.

    Returns:
      A bool array for each, with exactly k entries set in all; ties go to the first array and
      the lowest row-major index in it.
    """
    if sum(key.size for key in keys) == 0:
        return [jnp.zeros(key.shape, bool) for key in keys]
    return chosen([Search([_whole(key) for key in keys], jnp.asarray(k).astype(INDEX))])[0]


def largest_of_all(scores: Sequence[jax.Array], k: jax.Array | int) -> list[jax.Array]:
    """Masks of the k largest entries of several float arrays together (one global threshold).

    Args:
      scores: float arrays of any shapes; no NaN. Compared in float32 (float64 if any is).
      k: integer scalar from 0 to the number of all entries; may be traced.

    Returns:
      A bool array for each, with exactly k entries set in all; ties go to the first array and
      the lowest row-major index in it. On sharded arrays only counts travel.

    Example:
      >>> import jax.numpy as jnp
      >>> [m.tolist() for m in largest_of_all([jnp.array([1., 5.]), jnp.array([3., 4., 0.])], 3)]
      [[False, True], [True, True, False]]
    """
    wide = jnp.float64 if any(s.dtype == jnp.float64 for s in scores) else jnp.float32
    # Adding zero turns -0.0 into 0.0, which is what it is equal to.
    return largest_bits([ordered_bits(s.astype(wide) + 0) for s in scores], jnp.asarray(k))
