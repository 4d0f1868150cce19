"""Every method on MNIST under one protocol: 98 and 95%, 20 epochs, 4 seeds, `experiments.mlp`.

    python -m experiments.studies.methods --data_dir DIR --minutes 60

A queue of runs that skips what is recorded in results/methods_mnist.jsonl, so that it can be
stopped and continued at any time; then prints the table. A round every 100 steps where the method
takes it, an epoch of 468 steps for SET and five for MEST as published; CHT's score of a kernel
784 x 300 takes 5.5e10 multiply-adds a seed and round, so twice an epoch. Left out are STR, whose
sparsity comes out of its weight decay, and CSTI, which needs layers as wide as the image. Methods
since the paper come first, beside those they are compared with, then the others. A run takes a
minute or less on 2 idle CPU cores, all of them about an hour.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from experiments.studies.queue import Run, add_queue_options, mlp_run, work_off
from experiments.training import records
from experiments.training.arguments import Parser
from experiments.training.methods import METHODS
from experiments.training.tables import accuracy_table

SPARSITIES = (0.98, 0.95)
EVERY = {"set_published": 468, "mest_published": 2340, "cht": 234}  # steps; 100 for the others
FIRST = ("static", "set", "rigl", "dst_ee", "srigl", "smet", "gse", "ac_dc", "chts")
FIRST += ("set_published", "mest_published", "cht")
LATER = tuple(name for name in METHODS if name not in (*FIRST, "dense", "str", "csti"))


def words(method: str) -> list[str]:
    """Arguments of `experiments.mlp` for a method."""
    takes = "every" in METHODS[method].options
    return [f"--method={method}", *([f"--every={EVERY.get(method, 100)}"] if takes else [])]


def queue(args: argparse.Namespace) -> list[Run]:
    """Every run, in order; dense training after the first."""
    shared = [f"--results={args.results}", f"--data_dir={args.data_dir}", "--epochs=20"]
    rows = [(method, at) for some in (FIRST, LATER) for at in SPARSITIES for method in some]
    rows.insert(len(FIRST), ("dense", 0.0))
    return [mlp_run(*shared, f"--sparsity={at}", *words(method)) for method, at in rows]


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracy and R by method and sparsity."""
    return accuracy_table([one for run in runs for one in records.by_seed(run)])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "methods_mnist.jsonl")
    args = parser.parse_args(argv)
    work_off(args, queue(args), table)


if __name__ == "__main__":
    main()
