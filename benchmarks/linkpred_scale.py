"""Minutes and memory of the link-prediction pipeline on a graph of wiki-talk's size.

    python -m benchmarks.linkpred_scale

Writes a random temporal graph (1,140,149 nodes, 7,833,140 edges, degrees by a power law) to a
gzipped edge list, and runs the pipeline on it: reading, split, walks, skip-gram, and one epoch
of DST-EE at 90%. Prints seconds and the peak resident memory after each stage.
"""

import argparse
import gzip
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments import linkpred
from experiments.data import graphs, walks

NODES, EDGES = 1_140_149, 7_833_140


def write_graph(path: Path, nodes: int, edges: int) -> None:
    """A temporal graph whose sources and targets have power-law degrees."""
    rng = np.random.default_rng(0)
    weight = (1 + np.arange(nodes)) ** -0.8
    table = np.cumsum(weight / weight.sum())
    src, dst = (np.searchsorted(table, rng.random(edges)) for _ in range(2))
    src = rng.permutation(nodes)[np.minimum(src, nodes - 1)]
    time_ = rng.integers(1_000_000_000, 1_200_000_000, edges)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for i in range(0, edges, 500_000):
            rows = zip(*(x[i : i + 500_000].tolist() for x in (src, dst, time_)), strict=True)
            file.write("".join(f"{a} {b} {c}\n" for a, b, c in rows).encode())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--edges", type=int, default=EDGES)
    args = parser.parse_args(argv)
    begin = time.perf_counter()

    def report(stage: str) -> None:
        nonlocal begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{stage:<34}{time.perf_counter() - begin:8.1f} s   peak {peak:5.1f} GiB", flush=True)
        begin = time.perf_counter()

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.txt.gz"
        write_graph(path, args.nodes, args.edges)
        report("writing the graph")
        graph = graphs.read(path)
    report("reading")
    print(graphs.describe(graph))
    split = graphs.split(graph, 0)
    report("split and non-edges")
    used = split.walked
    found = walks.temporal_walks(graph.src[used], graph.dst[used], graph.time[used], graph.nodes)
    report(f"{len(found):,} walks")
    table = walks.skip_gram(found, graph.nodes)
    report("skip-gram, one epoch")
    del found
    linkpred.train("dst_ee", 0.9, table, split, seed=0, epochs=1, every=10)
    report("DST-EE at 90%, one epoch of 50")


if __name__ == "__main__":
    main()
