"""A queue of runs that skips what is recorded: it can be stopped and continued at any time."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from experiments import cifar, lm, mlp
from experiments.data import text
from experiments.training import records
from experiments.training.arguments import Parser, existing
from experiments.training.learner import given_options
from experiments.training.progress import conclude, over


class Run(NamedTuple):
    """A run of a queue.

    Attributes:
      results: the file of its record.
      settings: of its record, by which it is found there.
      data: names what `load` returns; runs of the same data share it.
      load: to the arrays of the data.
      train: of the arrays, to the record.
    """

    results: Path
    settings: dict[str, Any]
    data: tuple[str, ...]
    load: Callable[[], Any]
    train: Callable[[Any], dict[str, Any]]


def mlp_run(*words: str) -> Run:
    """`experiments.mlp` with these arguments."""
    args = mlp.parse([*words, "--quiet"])
    data = ("mlp", args.dataset, str(args.validation))
    return Run(
        args.results,
        mlp.settings(args),
        data,
        lambda: mlp.load(args),
        lambda arrays: mlp.run(args, arrays),
    )


def cifar_run(seed: int, *words: str) -> Run:
    """`experiments.cifar` with these arguments, and one seed."""
    args = cifar.parse([*words, "--quiet"])
    return Run(
        args.results,
        cifar.settings(args, seed),
        ("cifar", args.dataset, args.split),
        lambda: cifar.load(args),
        lambda arrays: cifar.run(args, seed, arrays),
    )


def lm_run(seed: int, *words: str) -> Run:
    """`experiments.lm` with these arguments, and one seed."""
    args = lm.parse([*words, "--quiet"])
    return Run(
        args.results,
        {**lm.settings(args, seed), "options": given_options(args)},
        ("lm", str(args.text), str(args.length)),
        lambda: text.load(args.text, args.length),
        lambda arrays: lm.run(args, arrays, seed),
    )


def add_queue_options(parser: Parser, results: str, images: bool = True) -> None:
    """The command line's options of a queue.

    Args:
      parser: to add to.
      results: name of the file of records.
      images: whether the runs read a data set of images.
    """
    parser.add_argument("--minutes", type=float, default=float("inf"), help="none begins later")
    if images:
        parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument("--results", type=Path, default=records.RESULTS / results)
    parser.add_argument("--table", type=existing, help="of records: print, train nothing")


def work_off(args: argparse.Namespace, queue: Sequence[Run], table: Callable[..., str]) -> None:
    """Work the queue off as `recorded` does, and print the table of what is recorded."""
    runs = recorded(args, queue)
    print(table(runs))
    conclude(Console(), f"{len(runs)} runs", record=args.table or args.results)


def recorded(args: argparse.Namespace, queue: Sequence[Run]) -> list[dict[str, Any]]:
    """The records of `--table`, or those of `--results` when the queue is worked off.

    No run begins after `--minutes`; what is left is then counted, and done by the same command.
    """
    if args.table:
        return records.read(args.table)
    begin = time.monotonic()
    left = [run for run in queue if records.find(run.results, run.settings) is None]
    data, arrays = None, None
    console = Console()
    for i, run in enumerate(over(left, "runs", console, done=len(queue) - len(left))):
        if time.monotonic() - begin > 60 * args.minutes:
            console.print(f"{len(left) - i} runs are left: the same command goes on with them.\n")
            break
        if run.data != data:
            try:
                data, arrays = run.data, run.load()
            except FileNotFoundError as error:
                raise SystemExit(f"error: {error}") from error
        records.append(run.results, run.train(arrays))
    return records.read(args.results) if args.results.exists() else []
