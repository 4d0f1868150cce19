"""What a command shows while it works, and the line that it ends with."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.training.arguments import ROOT

Step = TypeVar("Step")


def bar(console: Console) -> Progress:
    """A bar with the time that is gone and left; on a terminal alone, and none if quiet."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=console.quiet or not console.is_terminal,
        speed_estimate_period=1e9,  # seconds: steps may take minutes
        transient=True,
    )


def over(
    steps: Sequence[Step], what: str, console: Console | None = None, *, done: int = 0
) -> Iterator[Step]:
    """The steps, with a bar of them; lines that `console` prints come above it.

    Args:
      steps: to go over.
      what: stands before the bar.
      console: to draw on; a new one by default.
      done: how many steps came before these.
    """
    with bar(console or Console()) as progress:
        task = progress.add_task(what, total=done + len(steps), completed=done)
        for step in steps:
            yield step
            progress.advance(task)


def conclude(console: Console, what: str, **places: Path | None) -> None:
    """Print what came out, and where things are: 'static: 96.2%; record in results/mlp.jsonl'.

    Args:
      console: prints nothing if quiet.
      what: came out.
      **places: the names of things, as `record`, and their paths; None for what there is not.
    """
    found = [f"{name} in {shown(path)}" for name, path in places.items() if path is not None]
    console.print("; ".join([what, *found]), soft_wrap=True, highlight=False, markup=False)


def shown(path: Any) -> str:
    """A path as in a command: from the checkout's root, where it is inside."""
    path = Path(path)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Pace:
    """Milliseconds of a step, from the parts of a training between evaluations.

    Counted from the first evaluation of a process on: programs are compiled before it.
    """

    def __init__(self) -> None:
        self.begin: tuple[int, float] | None = None
        self.parts: list[tuple[int, float]] = []  # steps, ms a step

    def start(self, step: int) -> None:
        """After an evaluation, which followed `step`."""
        self.begin = step, time.perf_counter()

    def stop(self, step: int) -> None:
        """Before an evaluation, when `step` is done."""
        if self.begin:
            first, begin = self.begin
            self.parts.append((step - first, 1e3 * (time.perf_counter() - begin) / (step - first)))

    def ms(self, steps: int) -> float | None:
        """Of the fastest part of so many steps; None if there was none."""
        return min((round(ms, 2) for n, ms in self.parts if n == steps), default=None)
