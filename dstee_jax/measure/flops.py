"""FLOPs of a network from its jaxpr, leaf by leaf, dense and with masks.

What sparse kernels would cost: JAX computes masked weights densely.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from dstee_jax.masks.given import fitting_masks
from dstee_jax.trees import PyTree, is_dense, leaves_with_path, mask_leaves, path_name


class _Weights(NamedTuple):
    """An array of the program that is made of parameters and constants alone."""

    leaves: frozenset[tuple[int, int]] = frozenset()  # (size, index); none for a constant
    looked_up: bool = False  # rows picked by the inputs, as an embedding's


# None is data: all that depends on the inputs in another way than by looking up.
_Origin = _Weights | None
_CONSTANT = _Weights()
_Counts = Counter[int | None]  # multiply-adds by leaf; None: products that are no leaf's


class Flops(NamedTuple):
    """FLOPs of one call, two for a multiply-add; those of convolutions and dot products alone."""

    dense: int  # with all weights active
    sparse: int  # with the masks
    leaves: dict[str, tuple[int, int]]  # by path: (dense, sparse)
    other: int  # products without a parameter, as attention's; part of both sums


def flops(
    apply: Callable[..., Any], params: PyTree, *inputs: Any, masks: PyTree | None = None
) -> Flops:
    """Count the FLOPs of `apply(params, *inputs)`.

    Reads the jaxpr, nothing is computed: convolutions and dot products, also ragged ones, inside
    jit, scan (times its length), cond (the dearest branch), remat, custom derivatives, vmap and
    shard_map (all devices). A product of data and a parameter belongs to that parameter,
    whatever reshapes, casts, masks or normalises it on the way; where several were
    concatenated, to each by its size. What an embedding looks up is data. Padding counts as data.

    Args:
      apply: the network, or any function of params and inputs.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      *inputs: arrays or `jax.ShapeDtypeStruct`; a batch of one gives the FLOPs of a sample.
      masks: concrete masks with the structure of `params`, or an optimizer state that holds
        them; None for dense.

    Returns:
      `Flops`. A leaf's sparse FLOPs are its dense ones times the share of active weights.

    Raises:
      ValueError: masks are traced, or do not fit params.

    Warns:
      UserWarning: products in a `while_loop`, whose number of iterations nobody knows: they are
        counted once; or a kernel that is no jaxpr of JAX (Pallas): it is not counted.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
      >>> masks = {"kernel": jnp.arange(32).reshape(8, 4) < 8, "bias": optax.MaskedNode()}
      >>> apply = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> flops(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.float32), masks=masks)
      Flops(dense=64, sparse=16, leaves={'kernel': (64, 16)}, other=0)

    References:
      Evci et al., "Rigging the Lottery", 2020, Appendix H, for what is counted.
    """
    shares = _active_shares(params, masks)
    traced = jax.make_jaxpr(apply)(params, *inputs)
    origins: list[_Origin] = [
        _Weights(frozenset([(size, i)])) for i, (_, size) in enumerate(shares)
    ]
    origins += [None] * (len(traced.jaxpr.invars) - len(origins))
    _, macs = _walk(traced.jaxpr, [_CONSTANT] * len(traced.consts), origins)
    other = 2 * macs.pop(None, 0)
    leaves = {}
    for i, (path, _) in enumerate(leaves_with_path(params)):
        if i in macs:
            active, size = shares[i]
            leaves[path_name(path)] = (2 * macs[i], round(2 * macs[i] * active / size))
    dense, sparse = (other + sum(column) for column in zip((0, 0), *leaves.values(), strict=True))
    return Flops(dense, sparse, leaves, other)


def training_flops(dense: float, sparse: float, *, every: int | None = None) -> float:
    """FLOPs of one sample in a training step, forward and backward, on average over steps.

    The backward pass costs two forward ones: the gradients of inputs and of weights. With f_S
    sparse and f_D dense forward: 3 f_S where only active weights get a gradient, and
    (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1) where a dense gradient follows ΔT ordinary steps.

    Args:
      dense: f_D, of `flops(...).dense`.
      sparse: f_S, of `flops(...).sparse`; f_D itself for dense training.
      every: ΔT for RigL and DST-EE; 0 where each step has a dense gradient (SNFS; GMP with
        `sparse` at its mean sparsity); None where none has (static masks, SET).

    Returns:
      FLOPs of a sample.

    Raises:
      ValueError: `every` is negative.

    References:
      Evci et al., "Rigging the Lottery", 2020, Appendix H.
    """
    if every is None:
        return 3 * sparse
    if every < 0:
        raise ValueError(f"every={every} must be 0 or more, or None for no dense gradients.")
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)


def _active_shares(params: PyTree, masks: PyTree | None) -> list[tuple[int, int]]:
    """Active weights and size of each leaf."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    shares = [(size, max(size, 1)) for size in sizes]
    if masks is None:
        return shares
    for tree in fitting_masks(masks, params):
        for i, mask in enumerate(mask_leaves(tree, params)):
            if is_dense(mask):
                continue
            if not hasattr(mask, "sum") or isinstance(mask, jax.core.Tracer):
                raise ValueError("masks= must be concrete: count FLOPs outside jit and vmap.")
            shares[i] = (int(mask.sum()), shares[i][1])
    return shares


def _walk(
    jaxpr: Any, consts: Sequence[_Origin], args: Sequence[_Origin]
) -> tuple[list[_Origin], _Counts]:
    """Origins of a jaxpr's outputs, and its multiply-adds."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))
    counts: _Counts = Counter()

    def origin(var: Any) -> _Origin:
        return _CONSTANT if isinstance(var, Literal) else known[var]

    for eqn in jaxpr.eqns:
        ins = [origin(var) for var in eqn.invars]
        rule = _RULES.get(eqn.primitive.name, _other_primitive)
        outs, more = rule(eqn, ins)
        counts.update(more)
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [origin(var) for var in jaxpr.outvars], counts


def _closed(closed: Any, args: Sequence[_Origin]) -> tuple[list[_Origin], _Counts]:
    """The same for a jaxpr that may carry constants."""
    inner = getattr(closed, "jaxpr", closed)
    return _walk(inner, [_CONSTANT] * len(inner.constvars), args)


def _join(origins: Sequence[_Origin], *, all_leaves: bool = False) -> _Origin:
    """Data if any is; otherwise the largest leaf, as a kernel's in kernel times scale, or all."""
    found: set[tuple[int, int]] = set()
    looked_up = False
    for one in origins:
        if one is None:
            return None
        found |= one.leaves
        looked_up |= one.looked_up
    largest = 0 if all_leaves else max((size for size, _ in found), default=0)
    return _Weights(frozenset(leaf for leaf in found if leaf[0] >= largest), looked_up)


def _product(ins: list[_Origin], macs: int) -> tuple[list[_Origin], _Counts]:
    """A product's multiply-adds go to the weights that meet data, or a constant, in it."""

    def is_data(one: _Origin, other: _Origin) -> bool:
        if one is None or not one.leaves:
            return True
        return one.looked_up and other is not None and not other.looked_up

    a, b = ins
    weights = [one for one, other in ((a, b), (b, a)) if not is_data(one, other)]
    if a and b and len(weights) == 2:  # a low-rank kernel: no leaf, and not sparse; or embeddings
        return [None if a.looked_up else _CONSTANT], Counter({None: macs})
    if not weights or weights[0] is None:
        return [_join(ins)], Counter({None: macs})
    leaves = sorted(weights[0].leaves)
    counts: _Counts = Counter()
    total, left = sum(size for size, _ in leaves), macs
    for size, index in leaves[1:]:
        counts[index] = macs * size // total
        left -= counts[index]
    counts[leaves[0][1]] = left
    return [None], counts


def _dot(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return _product(ins, eqn.outvars[0].aval.size * summed)


def _ragged_dot(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    """Each row of the left side meets one group of the right side."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    used = {*contracted, *batch, *numbers.rhs_group_dimensions}
    left, right = (var.aval for var in eqn.invars[:2])
    free = math.prod(n for axis, n in enumerate(right.shape) if axis not in used)
    return _product(ins[:2], left.size * free)


def _convolution(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    kernel = eqn.invars[1].aval.shape
    summed = math.prod(kernel[axis] for axis in eqn.params["dimension_numbers"].rhs_spec[1:])
    zeros = math.prod(eqn.params["lhs_dilation"])  # a transposed convolution meets mostly zeros
    return _product(ins, eqn.outvars[0].aval.size * summed // zeros)


def _loop(
    body: Any, fixed: list[_Origin], carry: list[_Origin], xs: list[_Origin]
) -> tuple[list[_Origin], _Counts]:
    """One iteration, once the origins of the carry stand still."""
    while True:
        outs, counts = _closed(body, fixed + carry + xs)
        after = [_join(pair) for pair in zip(carry, outs, strict=False)]
        if after == carry:
            return outs, counts
        carry = after


def _scan(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    if "num_consts" in eqn.params:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:  # from jax 0.12 on
        consts, carry, _ = (len(part) for part in eqn.params["ft_in"].unpack())
    fixed, carried, xs = ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
    outs, counts = _loop(eqn.params["jaxpr"], fixed, carried, xs)
    return outs, Counter({leaf: macs * eqn.params["length"] for leaf, macs in counts.items()})


def _while(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    n, m = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    outs, counts = _loop(eqn.params["body_jaxpr"], ins[n:m], ins[m:], [])
    counts.update(_closed(eqn.params["cond_jaxpr"], ins[:n] + outs)[1])
    if counts:
        warnings.warn(
            "products in a while_loop are counted once: scan, or fori_loop with constant bounds, "
            "says how often it runs.",
            stacklevel=2,
        )
    return outs, counts


def _cond(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    branches = [_closed(branch, ins[1:]) for branch in eqn.params["branches"]]
    joined = [_join(outs) for outs in zip(*(outs for outs, _ in branches), strict=True)]
    return joined, max((counts for _, counts in branches), key=lambda counts: counts.total())


def _shard_map(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    outs, counts = _closed(eqn.params["jaxpr"], ins)
    sizes = dict(eqn.params["mesh"].shape)
    devices = math.prod(sizes[axis] for axis in eqn.params.get("newly_manual_axes", sizes))
    return outs, Counter({leaf: macs * devices for leaf, macs in counts.items()})


def _looked_up(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    """A part of an array is of its origin; rows of a constant picked by data are data."""
    table, index = ins[0], _join(ins[1:])
    if table is None or index is not None:
        return [table], Counter()
    return [table._replace(looked_up=True) if table.leaves else None], Counter()


def _select(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    cases = _join(ins[1:])
    return [cases if cases is None or cases.leaves else _join(ins)], Counter()


def _concatenate(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    return [_join(ins, all_leaves=True)], Counter()


def _other_primitive(eqn: Any, ins: list[_Origin]) -> tuple[list[_Origin], _Counts]:
    """A call of another jaxpr (jit, remat, custom derivatives), or no product at all."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    body = getattr(inner, "jaxpr", inner)
    if hasattr(body, "eqns") and len(body.invars) == len(ins) and eqn.primitive.name != _KERNEL:
        return _closed(inner, ins)
    if eqn.primitive.name == _KERNEL:
        warnings.warn("a Pallas kernel is not counted.", stacklevel=2)
    return [_join(ins)] * len(eqn.outvars), Counter()


_KERNEL = "pallas_call"
_RULES: dict[str, Callable[[Any, list[_Origin]], tuple[list[_Origin], _Counts]]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "gather": _looked_up,
    "dynamic_slice": _looked_up,
    "select_n": _select,
    "concatenate": _concatenate,
}
