"""Temporal graphs from edge lists: reading and cleaning, and the split for link prediction.

Two column orders are known: `src dst time` (SNAP) and `src dst weight time` (Network
Repository). Separators are spaces, tabs or commas; lines that start with % or # are comments;
files may be gzipped.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 24  # bytes read at once


class Graph(NamedTuple):
    """A directed temporal graph; edges in order of time."""

    src: np.ndarray  # int32, (edges,), node numbers from 0
    dst: np.ndarray  # int32, (edges,)
    time: np.ndarray  # float64, (edges,), never decreasing
    nodes: int
    dropped: dict[str, int]  # how many lines were left out, and why


class Split(NamedTuple):
    """Edges and as many non-edges for each part; each (n, 2) int32, edges first half."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    walked: np.ndarray  # bool, (edges,): which edges of the graph are training edges


def read(path: str | Path) -> Graph:
    """Read an edge list.

    Malformed lines, negative ids and self-loops are left out, exact duplicates are kept once,
    edges are sorted by time (stable), and nodes are numbered anew from 0 in the order of their
    ids. `describe` says what happened.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no line has 3 or 4 numbers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no edge list {path}: pass the path of a file.")
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    opened = gzip.open(path) if zipped else path.open("rb")
    rows, malformed, columns = [], 0, 0
    with opened as file:
        for text in _chunks(file):
            columns = columns or _columns(text)
            good, bad = _parse(text, columns)
            rows.append(good)
            malformed += bad
    table = np.concatenate(rows) if columns else np.zeros((0, 3))
    if not len(table):
        raise ValueError(
            f"{path} has no line of 3 numbers (src dst time) or 4 (src dst weight time)."
        )
    ends, time = table[:, :2], table[:, -1]
    if abs(ends[np.isfinite(ends)]).max(initial=0) >= 2**53:
        raise ValueError(f"{path} has ids of 2^53 and more, which are not told apart: number anew.")
    whole = (ends == np.floor(ends)).all(1) & np.isfinite(table).all(1)
    dropped = {"malformed": malformed + int((~whole).sum())}
    negative = whole & (ends < 0).any(1)
    loops = whole & ~negative & (ends[:, 0] == ends[:, 1])
    dropped |= {"negative ids": int(negative.sum()), "self-loops": int(loops.sum())}
    good = whole & ~negative & ~loops
    names, numbers = np.unique(ends[good].astype(np.int64), return_inverse=True)
    numbers, time = numbers.reshape(-1, 2).astype(np.int32), time[good]
    # By time, then source, then target: equal lines stand next to each other.
    order = np.lexsort((numbers[:, 1], numbers[:, 0], time))
    numbers, time = numbers[order], time[order]
    again = np.zeros(len(time), bool)
    again[1:] = (numbers[1:] == numbers[:-1]).all(1) & (time[1:] == time[:-1])
    dropped["duplicates"] = int(again.sum())
    src, dst = numbers[~again].T.copy()
    return Graph(src, dst, time[~again], len(names), dropped)


def describe(graph: Graph) -> str:
    """One line: nodes, edges, and what was left out."""
    left = ", ".join(f"{n:,} {why}" for why, n in graph.dropped.items() if n) or "nothing"
    return f"{graph.nodes:,} nodes, {len(graph.src):,} timed edges (left out: {left})"


def _chunks(file):
    """Whole lines, some megabytes at once, with spaces for tabs and commas."""
    rest = b""
    while block := file.read(_CHUNK):
        text, _, rest = (rest + block).rpartition(b"\n")
        yield text.replace(b"\t", b" ").replace(b",", b" ").replace(b"\r", b" ") + b"\n"
    if rest.strip():
        yield rest.replace(b"\t", b" ").replace(b",", b" ").replace(b"\r", b" ") + b"\n"


def _columns(text: bytes) -> int:
    """3 or 4, of the first line that has as many numbers; 0 if none has."""
    for line in text.splitlines():
        fields = line.split()
        if len(fields) in (3, 4) and all(map(_is_number, fields)):
            return len(fields)
    return 0


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _parse(text: bytes, columns: int) -> tuple[np.ndarray, int]:
    """Rows of numbers (n, columns) float64, and how many lines are malformed."""
    plain = b"#" not in text and b"%" not in text
    if columns and plain and _all_have(text, columns):
        numbers = _numbers(text)
        if numbers is not None and numbers.size % columns == 0:
            return numbers.reshape(-1, columns), 0
    rows, bad = [], 0
    for line in text.splitlines():
        fields = line.split()
        if not fields or fields[0][:1] in (b"#", b"%"):
            continue
        if len(fields) == columns and all(map(_is_number, fields)):
            rows.append([float(field) for field in fields])
        else:
            bad += 1
    return np.array(rows, np.float64).reshape(-1, max(columns, 1)), bad


def _all_have(text: bytes, columns: int) -> bool:
    """Whether each line has that many fields."""
    raw = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(raw == 10)
    blank = raw <= 32
    starts = np.flatnonzero(~blank & np.concatenate([[True], blank[:-1]]))
    fields = np.diff(np.searchsorted(starts, ends), prepend=0)
    return bool((fields == columns).all())


def _numbers(text: bytes) -> np.ndarray | None:
    """All numbers of a text; None if something else stands in it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return np.fromstring(text, np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None


def split(graph: Graph, seed: int, *, test: float = 0.2, validation: float = 0.2) -> Split:
    """Train, validation and test edges, each with as many non-edges.

    The latest share of the edges by time is for the test (edges of equal time in random
    order); validation edges are drawn from the rest. Each part draws its own non-edges: in a
    dense graph some are in two parts.

    Raises:
      ValueError: fewer than 10 edges.
    """
    edges = len(graph.src)
    if edges < 10:
        raise ValueError(f"the graph has {edges} edges: 10 are needed for a split.")
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(edges), graph.time))
    cut = edges - round(test * edges)
    early, late = rng.permutation(order[:cut]), order[cut:]
    held_out = round(validation * edges)
    ends = np.stack([graph.src, graph.dst], 1)
    keys = np.unique(graph.src * np.int64(graph.nodes) + graph.dst)
    parts = [
        np.concatenate([ends[part], non_edges(ends[part], keys, graph.nodes, rng)])
        for part in (early[held_out:], early[:held_out], late)
    ]
    walked = np.zeros(edges, bool)
    walked[early[held_out:]] = True
    return Split(*parts, walked)


def non_edges(
    edges: np.ndarray, keys: np.ndarray, nodes: int, rng: np.random.Generator
) -> np.ndarray:
    """As many pairs that are no edge of the graph: half keep the source, half have two new ends.

    Args:
      edges: int32 (n, 2).
      keys: sorted `src * nodes + dst` of all edges of the graph, int64.
      nodes: number of nodes.
      rng: random numbers.

    Raises:
      ValueError: the graph is nearly complete, so that none can be found.
    """
    pairs = edges.copy()
    keep_source = np.arange(len(edges)) < len(edges) // 2
    todo = np.arange(len(edges))
    for attempt in range(1000):
        pairs[todo, 1] = rng.integers(nodes, size=len(todo))
        # A source with edges to all nodes has no non-edge: after many tries it is drawn anew.
        new_source = todo[~keep_source[todo]] if attempt < 500 else todo
        pairs[new_source, 0] = rng.integers(nodes, size=len(new_source))
        key = pairs[todo, 0] * np.int64(nodes) + pairs[todo, 1]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        todo = todo[(keys[at] == key) | (pairs[todo, 0] == pairs[todo, 1])]
        if not len(todo):
            return pairs
    raise ValueError(
        f"no non-edges: {len(keys)} of {nodes * (nodes - 1)} possible edges are in the graph."
    )
