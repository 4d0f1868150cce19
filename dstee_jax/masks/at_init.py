"""Masks from before training: SNIP, GraSP, SynFlow, magnitude, CSTI, random.

All take `(fn, params, batch, sparsity, key)` and `where`, and return masks for
`dstee.methods.static(optimizer, masks=...)` or any other `transform(masks=...)`. `fn` is the
loss `(params, batch) -> scalar` (SynFlow: the network `(params, inputs) -> outputs`); what a
method does not need may be None. The sparsity holds for all selected leaves together: exactly
`round((1 - sparsity) * weights)` stay active (`random`, `csti`: the exact counts of their
distribution). A leaf can be emptied by SNIP, GraSP and magnitude, as in their papers.

Under `jit` and `vmap` the masks are traced: fine for `static`, whose masks never change; a
dynamic method needs concrete ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dstee_jax.arguments import shown
from dstee_jax.masks import distributions
from dstee_jax.masks.counts import Where
from dstee_jax.masks.random import init_masks
from dstee_jax.masks.where import kernels, selected
from dstee_jax.rules.units import output_units
from dstee_jax.selection.bisection import largest_of_all
from dstee_jax.trees import PyTree, is_dense, mask_leaves

Loss = Callable[[PyTree, Any], jax.Array]


def random(
    fn: None,
    params: PyTree,
    batch: None,
    sparsity: float,
    key: jax.Array,
    *,
    where: Where = kernels,
    distribution: distributions.Distribution = distributions.erk,
) -> PyTree:
    """Random masks of exact counts by leaf: `dstee.init_masks` with the arguments of the others.

    Args:
      fn, batch: not used.
      params, sparsity, key, where, distribution: of `dstee.init_masks`.

    Returns:
      bool masks with the structure of `params`.
    """
    return init_masks(params, sparsity, key, distribution=distribution, where=where)


def csti(
    fn: None,
    params: PyTree,
    batch: jax.Array,
    sparsity: float,
    key: jax.Array,
    *,
    where: Where = kernels,
    distribution: distributions.Distribution = distributions.erk,
) -> PyTree:
    """CSTI: link units whose input features correlate most, by |Pearson| over a batch; CHT's.

    A kernel of (a d, b d), with d features, takes the correlations of features a times by b times
    side by side, those of a feature with itself being 0, and keeps the largest, as many as the
    distribution gives it. Kernels of other sizes have random masks.

    Args:
      fn: not used; None will do.
      params: pytree of arrays.
      batch: inputs, (samples, ...); the features are all axes but the first.
      sparsity: of all selected leaves together, in [0, 1).
      key: PRNG key, for the random masks.
      where: `(path, leaf) -> bool`, which leaves are sparse.
      distribution: how the sparsity is shared among the leaves.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: no kernel has sizes that are multiples of the number of features, or the batch
        is no array of inputs whose features correlate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0, 0.0], [2.0, 4.0, 1.0], [3.0, 6.0, 0.0]])
      >>> csti(None, {"kernel": jnp.ones((3, 3))}, x, 7 / 9, jax.random.key(0))["kernel"].tolist()
      [[False, True, False], [True, False, False], [False, False, False]]

    References:
      Zhang et al., "Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep learning", 2024, and its code.

    Deviations:
      Exact counts, where theirs keep all that tie with the last; sizes other than one or two times
      the features are ours.
    """
    if not hasattr(batch, "shape") or len(batch.shape) < 2 or 0 in batch.shape:
        raise ValueError(
            f"batch={shown(batch)} of CSTI must be an array of inputs (samples, ...), with some of "
            "each."
        )
    x = batch.reshape(batch.shape[0], -1).astype(jnp.float32)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=0))
    x = x / jnp.where(norm > 0, norm, 1.0)[None, :]
    features = x.shape[1]
    links = jnp.abs(x.T @ x) * (1 - jnp.eye(features, dtype=jnp.float32))
    first = init_masks(params, sparsity, key, distribution=distribution, where=where)
    leaves, treedef = jax.tree.flatten(params)
    masks, found = mask_leaves(first, params), False
    for i, mask in enumerate(masks):
        if not is_dense(mask) and mask.ndim == 2 and not any(n % features for n in mask.shape):
            found = True
            tiled = jnp.tile(links, [n // features for n in mask.shape])
            (masks[i],) = largest_of_all([tiled], jnp.sum(mask, dtype=jnp.int32))
    if not found:
        raise ValueError(
            f"no kernel has two axes that are multiples of the {features} features of the batch: "
            f"CSTI links copies of them, and the leaves are {[jnp.shape(x) for x in leaves]}. Make "
            f"the layer that reads them {features} units wide, or a multiple of it."
        )
    if _is_concrete([links]) and not bool(jnp.isfinite(links).all() & links.any()):
        raise ValueError(
            f"the {batch.shape[0]} inputs of the batch have no finite correlations between their "
            "features: pass more of them, without NaN, that differ."
        )
    return jax.tree.unflatten(treedef, masks)


def magnitude(
    fn: None,
    params: PyTree,
    batch: None,
    sparsity: float,
    key: jax.Array | None = None,
    *,
    where: Where = kernels,
) -> PyTree:
    """Keep the largest absolute weights over all selected leaves.

    Args:
      fn, batch, key: not used; None will do.
      params: pytree of arrays.
      sparsity: of all selected leaves together, in [0, 1).
      where: `(path, leaf) -> bool`, which leaves are sparse.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: the sparsity is out of range, or `where` selects nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude(None, {"kernel": jnp.array([[1., -3.], [2., 0.]])}, None, 0.5)
      {'kernel': Array([[False,  True],
             [ True, False]], dtype=bool)}
    """
    chosen = selected(params, where)
    return _keep_best(params, chosen, [jnp.abs(w) for w in _picked(params, chosen)], sparsity)


def snip(
    fn: Loss | None,
    params: PyTree,
    batch: Any,
    sparsity: float,
    key: jax.Array | None = None,
    *,
    where: Where = kernels,
) -> PyTree:
    """SNIP: keep the weights whose removal would change the loss most, by |w * dL/dw|.

    Args:
      fn: the loss, `(params, batch) -> scalar`.
      params: pytree of arrays, freshly initialised.
      batch: what `fn` takes; one batch of training data.
      sparsity: of all selected leaves together, in [0, 1).
      key: not used; None will do.
      where: `(path, leaf) -> bool`, which leaves are sparse.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: no loss or batch, a gradient that is zero everywhere or not finite, or a
        sparsity out of range.

    References:
      Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019,
      Eq. 5 and 6.

    Deviations:
      The official code prunes biases too and draws new weights afterwards; here biases stay
      dense and the weights are kept.
    """
    loss = _need(fn, batch, "snip")
    chosen = selected(params, where)
    weights = _picked(params, chosen)
    grads = jax.grad(_of_selected(loss, params, chosen, batch))(weights)
    scores = [jnp.abs(w * g) for w, g in zip(weights, grads, strict=True)]
    return _keep_best(params, chosen, scores, sparsity)


def grasp(
    fn: Loss | None,
    params: PyTree,
    batch: Any,
    sparsity: float,
    key: jax.Array | None = None,
    *,
    where: Where = kernels,
) -> PyTree:
    """GraSP: keep the gradient flowing. Removes the weights of largest -w * (H g).

    g is the gradient of the loss and H its Hessian, both with respect to the selected leaves.

    Args:
      fn: the loss, `(params, batch) -> scalar`, differentiable twice. The paper divides the
        logits by a temperature of 200: do it in the loss.
      params: pytree of arrays, freshly initialised.
      batch: what `fn` takes; the paper takes about 10 samples of each class.
      sparsity: of all selected leaves together, in [0, 1).
      key: not used; None will do.
      where: `(path, leaf) -> bool`, which leaves are sparse.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: no loss or batch, scores that are zero everywhere or not finite, or a
        sparsity out of range.

    References:
      Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020,
      Eq. 8 and Algorithm 1.
    """
    loss = _need(fn, batch, "grasp")
    chosen = selected(params, where)
    weights = _picked(params, chosen)
    grad = jax.grad(_of_selected(loss, params, chosen, batch))
    _, product = jax.jvp(grad, (weights,), (grad(weights),))
    # Removed: largest -w * Hg. Kept: largest w * Hg.
    scores = [w * hg for w, hg in zip(weights, product, strict=True)]
    return _keep_best(params, chosen, scores, sparsity)


def synflow(
    fn: Callable[[PyTree, Any], jax.Array] | None,
    params: PyTree,
    batch: Any,
    sparsity: float,
    key: jax.Array | None = None,
    *,
    where: Where = kernels,
    rounds: int = 100,
    output_axis: int = -1,
) -> PyTree:
    """SynFlow: prune step by step by the flow of ones through absolute weights; needs no data.

    R is the sum of the outputs for an input of ones, with all parameters replaced by their
    absolute values; a weight scores |w| * dR/d|w|. Round r of `rounds` keeps the best
    density^(r / rounds) of the weights. No leaf loses its best weight.

    Args:
      fn: the network, `(params, inputs) -> outputs`, with normalisation layers in evaluation
        mode and fresh statistics.
      params: pytree of arrays, freshly initialised.
      batch: inputs, of which only shape and dtype are used: an array, or a
        `jax.ShapeDtypeStruct`. One sample is enough.
      sparsity: of all selected leaves together, in [0, 1).
      key: not used; None will do.
      where: `(path, leaf) -> bool`, which leaves are sparse.
      rounds: pruning rounds, at least 1.
      output_axis: of a leaf's units: -1 for kernels (..., inputs, outputs), as Flax has them, 0
        for (outputs, inputs, ...), as Equinox and PyTorch have them.

    Returns:
      The structure of `params`: a bool array for each selected leaf, `optax.MaskedNode()` for
      the others.

    Raises:
      ValueError: no network or input shape, no path from inputs to outputs, fewer weights to
        keep than leaves, or a sparsity out of range.

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving
      synaptic flow", 2020, Eq. 4 and Algorithm 1.

    Deviations:
      Before each round a leaf is divided by the mean flow into its output units, so that deep
      networks neither overflow nor underflow in float32, where the authors compute in float64.
      In a network without biases and skip connections this changes no ranking: every score
      carries the same product of factors. Absolute values of running statistics are left to
      `fn`; those of a fresh batch norm (0 and 1) are non-negative already.
    """
    network = _need(fn, batch, "synflow")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1; the paper takes 100.")
    chosen = selected(params, where)
    leaves, treedef = jax.tree.flatten(params)
    positive = [jnp.abs(leaf) for leaf in leaves]
    weights = [positive[i] for i in chosen]
    total = sum(w.size for w in weights)
    keep = _kept(total, sparsity)
    if keep < len(weights):
        raise ValueError(
            f"sparsity={sparsity} keeps {keep} weights for {len(weights)} leaves: SynFlow never "
            "empties one. Lower the sparsity."
        )
    ones = jnp.ones(batch.shape, batch.dtype)

    def flow(active: list[jax.Array]) -> jax.Array:
        full = list(positive)
        for i, w in zip(chosen, active, strict=True):
            full[i] = w
        return jnp.sum(network(jax.tree.unflatten(treedef, full), ones), dtype=jnp.float32)

    def score(masks: list[jax.Array]) -> list[jax.Array]:
        scaled = []
        for w, mask in zip(weights, masks, strict=True):
            active = jnp.where(mask, w, 0)
            into = jnp.sum(active) / output_units(active.shape, output_axis)
            scaled.append(active / jnp.where(into > 0, into, 1))
        return [w * g for w, g in zip(scaled, jax.grad(flow)(scaled), strict=True)]

    def prune(r: jax.Array, masks: list[jax.Array]) -> list[jax.Array]:
        scores = []
        for s, mask in zip(score(masks), masks, strict=True):
            s = jnp.where(mask, s, -1.0).reshape(-1)  # no score is negative: pruned ones go last
            scores.append(s.at[s.argmax()].set(jnp.inf).reshape(mask.shape))
        share = (r + 1.0) / rounds
        count = jnp.round(total * (keep / total) ** share).astype(jnp.uint32)
        return largest_of_all(scores, jnp.maximum(count, keep))

    everything = [jnp.ones(w.shape, bool) for w in weights]
    if _is_concrete(weights) and not any(bool(s.any()) for s in score(everything)):
        raise ValueError(
            "no synaptic flow: there is no path of non-zero weights from the inputs to the "
            "outputs. Check fn and params."
        )
    return _as_masks(params, chosen, jax.lax.fori_loop(0, rounds, prune, everything))


def _picked(params: PyTree, chosen: list[int]) -> list[jax.Array]:
    leaves = jax.tree.leaves(params)
    return [jnp.asarray(leaves[i]) for i in chosen]


def _of_selected(loss: Loss, params: PyTree, chosen: list[int], batch: Any) -> Callable:
    """The loss as a function of the selected leaves alone."""
    leaves, treedef = jax.tree.flatten(params)

    def of_weights(weights: list[jax.Array]) -> jax.Array:
        full = list(leaves)
        for i, w in zip(chosen, weights, strict=True):
            full[i] = w
        return loss(jax.tree.unflatten(treedef, full), batch)

    return of_weights


def _need(fn: Any, batch: Any, name: str) -> Any:
    what = "the network, (params, inputs) -> outputs" if name == "synflow" else "the loss"
    if fn is None:
        raise ValueError(f"at_init.{name} needs a function: pass fn, {what}.")
    if batch is None:
        example = "inputs of the right shape" if name == "synflow" else "a batch of training data"
        raise ValueError(f"at_init.{name} needs a batch: pass {example} as its third argument.")
    return fn


def _kept(total: int, sparsity: float) -> int:
    if not isinstance(sparsity, float | int):
        raise ValueError(f"sparsity={shown(sparsity)}: one number for all leaves, as 0.95.")
    distributions.check_sparsity(sparsity)
    keep = round((1 - sparsity) * total)
    if keep < 1:
        raise ValueError(f"sparsity={sparsity} keeps none of {total} weights: lower it.")
    return keep


def _is_concrete(arrays: list[jax.Array]) -> bool:
    return not any(isinstance(x, jax.core.Tracer) for x in arrays)


def _keep_best(
    params: PyTree, chosen: list[int], scores: list[jax.Array], sparsity: float
) -> PyTree:
    """Masks of the best scores over all selected leaves together."""
    if _is_concrete(scores):
        if not all(bool(jnp.isfinite(s).all()) for s in scores):
            raise ValueError("some scores are not finite: check the parameters and the batch.")
        if not any(bool(s.any()) for s in scores):
            raise ValueError(
                "all scores are zero: the loss does not depend on the selected leaves. Check fn "
                "and where."
            )
    keep = _kept(sum(s.size for s in scores), sparsity)
    return _as_masks(params, chosen, largest_of_all(scores, keep))


def _as_masks(params: PyTree, chosen: list[int], masks: list[jax.Array]) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    nodes: list[Any] = [optax.MaskedNode()] * len(leaves)
    for i, mask in zip(chosen, masks, strict=True):
        nodes[i] = mask
    return jax.tree.unflatten(treedef, nodes)
