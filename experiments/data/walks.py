"""Node embeddings of a temporal graph: random walks that never go back in time, and skip-gram.

Array code: a walker is an entry of an array, and all walkers step at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax


def temporal_walks(
    src: np.ndarray,
    dst: np.ndarray,
    time: np.ndarray,
    nodes: int,
    *,
    per_node: int = 10,
    steps: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Random walks along edges whose times never decrease.

    A walker at a node takes one of its outgoing edges that are not earlier than the edge before,
    uniformly; it stops where there is none.

    Args:
      src, dst: int (edges,), nodes from 0.
      time: numbers (edges,).
      nodes: number of nodes.
      per_node: walks from each node.
      steps: at most, for each walk.
      seed: of the walks.

    Returns:
      int32 (walks, steps + 1), -1 after the end; walks without a step are left out.

    References:
      Nguyen et al., "Continuous-Time Dynamic Network Embeddings", 2018, Section 3.
    """
    rng = np.random.default_rng(seed)
    moments = np.unique(time)
    rank = np.searchsorted(moments, time)
    # Edges by source, then time: those of a walker are one run of this order.
    keys = src.astype(np.int64) * len(moments) + rank
    order = np.argsort(keys, kind="stable")
    keys, heads = keys[order], dst[order].astype(np.int32)
    ends = np.searchsorted(keys, np.arange(1, nodes + 1, dtype=np.int64) * len(moments))
    begins = np.concatenate([[0], ends[:-1]])
    starts = np.flatnonzero(ends > begins).astype(np.int32)
    walks = np.full((len(starts) * per_node, steps + 1), -1, np.int32)
    walks[:, 0] = np.repeat(starts, per_node)
    walking, first = np.arange(len(walks)), np.repeat(begins[starts], per_node)
    for step in range(steps):
        end = ends[walks[walking, step]]
        alive = first < end
        walking, first, end = walking[alive], first[alive], end[alive]
        taken = first + (rng.random(len(walking)) * (end - first)).astype(np.int64)
        walks[walking, step + 1] = heads[taken]
        now = keys[taken] % len(moments)
        first = np.searchsorted(keys, heads[taken] * np.int64(len(moments)) + now)
    return walks


def skip_gram(
    walks: np.ndarray,
    nodes: int,
    *,
    dimension: int = 8,
    window: int = 10,
    negatives: int = 5,
    learning_rate: float = 0.2,
    epochs: int = 1,
    batch: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Embeddings by skip-gram with negative sampling on walks.

    Each node of a walk predicts the others within the window, against `negatives` nodes for
    each, drawn by their frequency in the walks to the power 0.75. Adagrad on batches of walks.

    Args:
      walks: int32 (walks, length), -1 after the end.
      nodes: number of nodes.
      dimension: of an embedding.
      window: how far apart in a walk.
      negatives: for each pair.
      learning_rate: Adagrad's.
      epochs: passes over the walks.
      batch: walks at once; by default 1/1000 of them, from 64 to 16,384.
      seed: of the order, the start and the negatives.

    Returns:
      float32 (nodes, dimension).

    References:
      Mikolov et al., "Distributed Representations of Words and Phrases and their
      Compositionality", 2013, Eq. 4.

    Deviations:
      The `negatives` of a node's position serve all of its pairs, with their weight; word2vec
      draws others for each pair and takes plain SGD, one pair after another.
    """
    if batch is None:
        batch = int(np.clip(len(walks) // 1000, 64, 16_384))
    counts = np.bincount(walks[walks >= 0], minlength=nodes)
    table = jnp.asarray(np.cumsum(counts**0.75) / np.sum(counts**0.75), jnp.float32)
    key = jax.random.key(seed)
    inputs = (jax.random.uniform(key, (nodes, dimension)) - 0.5) / dimension
    tables = (inputs, jnp.zeros_like(inputs))
    tx = optax.adagrad(learning_rate, initial_accumulator_value=1e-2)
    state = tx.init(tables)
    step = functools.partial(_step, tx, window, negatives)
    step = jax.jit(step, donate_argnums=(0, 1))
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(len(walks))
        for i in range(0, len(order), batch):
            some = np.full((batch, walks.shape[1]), -1, np.int32)
            taken = walks[order[i : i + batch]]
            some[: len(taken)] = taken
            own = jax.random.fold_in(jax.random.fold_in(key, epoch + 1), i)
            tables, state = step(tables, state, some, own, table)
    return np.asarray(tables[0])


def _step(tx, window, negatives, tables, state, walks, key, table):
    """One batch of walks (b, length): new tables and optimizer state."""
    length = walks.shape[1]
    place = jnp.arange(length)
    near = (jnp.abs(place[:, None] - place) <= window) & (place[:, None] != place)
    valid = walks >= 0
    pairs = near & valid[:, :, None] & valid[:, None, :]
    weight = pairs.sum(-1)  # how many pairs a position has
    draw = jax.random.uniform(key, (*walks.shape, negatives))
    others = jnp.minimum(jnp.searchsorted(table, draw), len(table) - 1)

    def loss(tables):
        inputs, outputs = tables
        centre, context, wrong = inputs[walks], outputs[walks], outputs[others]
        right = jnp.einsum("bid,bjd->bij", centre, context)
        against = jnp.einsum("bid,bind->bin", centre, wrong)
        gain = jnp.where(pairs, jax.nn.log_sigmoid(right), 0).sum()
        return -gain - (weight[..., None] * jax.nn.log_sigmoid(-against)).sum()

    updates, state = tx.update(jax.grad(loss)(tables), state)
    return optax.apply_updates(tables, updates), state
