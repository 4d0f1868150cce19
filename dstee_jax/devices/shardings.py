"""Shardings: how an optimizer's state lies on devices, from how the parameters do."""

import functools
import itertools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dstee_jax.masks.counts import Blocks
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, path_name, path_parts


def state_shardings(opt_state: PyTree, params: PyTree) -> PyTree:
    """A sharding for each leaf of an optimizer state: its parameter's, or replicated.

    Masks, counters, moments and what a method keeps of its own lie as their parameters do; so do
    packed moments and indices, whose blocks are cut along the same axes. They are found top down:
    the first node that has the names of all parameters, in order, holds a leaf for each of them,
    whatever it is called itself. Scalars, keys, and leaves that a spec does not divide are
    replicated.

    Args:
      opt_state: state or shapes, as `jax.eval_shape(tx.init, params)`.
      params: arrays with a `NamedSharding`, or `jax.ShapeDtypeStruct`s that carry one.

    Returns:
      The structure of `opt_state`, a `NamedSharding` for each leaf: for `jit`'s `in_shardings`
      and `out_shardings`.

    Raises:
      ValueError: a parameter has no `NamedSharding`.

    Example:
      >>> import dstee_jax as dstee, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> params = {"kernel": jnp.ones((20, 10), device=NamedSharding(mesh, P("fsdp")))}
      >>> tx = dstee.transform(optax.adam(1e-2), sparsity=0.9, total_steps=1000,
      ...                      key=jax.random.key(0))
      >>> shardings = dstee.state_shardings(jax.eval_shape(tx.init, params), params)
      >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> opt_state.masks["kernel"].sharding == params["kernel"].sharding
      True
    """
    by_path = _placed(params)
    if not by_path:
        raise ValueError("params has no leaf: pass the parameters that opt_state was made for.")
    everywhere = NamedSharding(next(iter(by_path.values()))[1].mesh, P())

    def each(node: Any) -> list[NamedSharding]:
        """For each leaf of a node of the state, in order."""
        owned = _by_parameter(node, list(by_path))
        if owned:
            return [_as(leaf, *by_path[path]) for path, leaf in owned]
        children = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        if children and children[0] is node:
            return [everywhere]
        return [place for child in children for place in each(child)]

    return jax.tree.unflatten(jax.tree.structure(opt_state), each(opt_state))


def blocks_of(params: PyTree) -> Blocks:
    """As many blocks along each axis of a leaf as devices hold parts of it.

    For `transform(..., packed=True, blocks=dstee.blocks_of(params))`: indices and moments of
    packed leaves then stay on the device that holds the weights. Each block keeps its own count
    of active weights, so masks depend on the sharding: to go on with another number of devices,
    keep the blocks of the first.

    Args:
      params: as for `state_shardings`.

    Returns:
      `(path, leaf) -> parts` of each axis.

    Raises:
      ValueError: a parameter has no `NamedSharding`.
    """
    by_path = _placed(params)

    def blocks(path: Any, leaf: Any) -> tuple[int, ...]:
        if path_parts(path) not in by_path:
            raise ValueError(
                f"blocks_of was given no {path_name(path)}: pass it the same tree as tx.init."
            )
        shape, place = by_path[path_parts(path)]
        spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
        return tuple(_devices(place, names) for names in spec)

    return blocks


def _placed(params: PyTree) -> dict[tuple[str, ...], tuple[tuple[int, ...], NamedSharding]]:
    """Shape and sharding of each parameter by its path."""
    by_path = {}
    for path, leaf in leaves_with_path(params):
        if is_dense(leaf):
            continue
        place = getattr(leaf, "sharding", None)
        if not isinstance(place, NamedSharding):
            raise ValueError(
                f"{path_name(path)} has sharding {place}: put the parameters on a mesh first, with "
                "jax.device_put or as jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
            )
        by_path[path_parts(path)] = (tuple(leaf.shape), place)
    return by_path


def _by_parameter(node: Any, paths: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a node with the path of the parameter of each; empty if it has other names.

    A `MaskedNode` may stand for a leaf or for all below it.
    """
    owned, left = [], paths
    for key_path, leaf in leaves_with_path(node):
        path = path_parts(key_path)
        if not is_dense(leaf):
            if left[:1] != [path]:
                return []
            owned.append((path, leaf))
        if not left or not _is_below(path, left[0]):
            return []
        left = list(itertools.dropwhile(functools.partial(_is_below, path), left))
    return [] if left else owned


def _is_below(path: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return other[: len(path)] == path


def _as(leaf: Any, shape: tuple[int, ...], place: NamedSharding) -> NamedSharding:
    """The sharding of a leaf that belongs to a parameter of that shape and sharding."""
    more = leaf.ndim - len(shape)
    spec = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    if more > 0:  # a memory has axes before the parameter's, indices one after them
        before = leaf.shape[more:] == shape
        spec = [None] * more + spec if before else spec + [None] * more
    sizes = [_devices(place, names) for names in spec]
    if more < 0 or any(n % size for n, size in zip(leaf.shape, sizes, strict=True)):
        return NamedSharding(place.mesh, P())
    return place if more == 0 else NamedSharding(place.mesh, P(*spec))


def _devices(place: NamedSharding, names: Any) -> int:
    """Over how many devices a dimension is split."""
    size = 1
    for name in names if isinstance(names, tuple) else (names,):
        size *= 1 if name is None else place.mesh.shape[name]
    return size
