"""What a long run needs around its training: its settings, its log, and ways to be stopped."""

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.training import records


def write_whole(path: Path, text: str) -> None:
    """Write a file in one go: who is killed meanwhile leaves the file as it was."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def check_same_command(args: argparse.Namespace, free: set[str]) -> None:
    """Raise if `--work_dir` holds a run with other settings (but `free` ones); remember these."""
    text = json.dumps({k: v for k, v in vars(args).items() if k not in free}, indent=1)
    own, path = json.loads(text), args.work_dir / "config.json"  # tuples are lists in a file
    if jax.process_index() == 0 and not path.exists():
        write_whole(path, text)
    multihost_utils.sync_global_devices("config.json")
    before = json.loads(path.read_text())
    changed = [k for k in own if before.get(k, own[k]) != own[k]]
    if changed:
        was = ", ".join(f"--{k} {before[k]}" for k in changed)
        raise SystemExit(
            f"error: the run in --work_dir had {was}: pass the same, or another --work_dir."
        )


def record_once(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append the record of a run to `--results`; one that goes on in `--work_dir` only once."""
    done = args.work_dir / "recorded" if args.work_dir else None
    if done and done.exists():
        return
    records.append(args.results, record)
    if done:
        done.touch()


def leave(error: Exception) -> None:
    """End this process at once: waiting for the others at the exit could take minutes."""
    sys.stdout.flush()
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} can't go on:\n{error}\n"
        "If another process has died, start the same command again on all of them (any number of "
        "devices): it goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


class Preemption:
    """Whether somebody asked this run to end with SIGTERM; all processes agree on the step."""

    def __init__(self):
        self._asked = threading.Event()
        if jax.process_count() == 1:  # with more, the coordination service has the signal
            signal.signal(signal.SIGTERM, lambda *_: self._asked.set())

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)


class Events:
    """TensorBoard events of a run; writes on the first process alone."""

    def __init__(self, directory: Path, first_step: int = 0):
        """`first_step`: where the run goes on from; later events of an earlier run are hidden."""
        from tensorboardX import SummaryWriter

        path, purge = (
            str(directory / "events"),
            {"purge_step": first_step + 1} if first_step else {},
        )
        self.writer = SummaryWriter(path, **purge) if jax.process_index() == 0 else None

    def add(self, step: int, **values: float) -> None:
        """Add one value for each name, at a step."""
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class Log:
    """Lines on the console, JSON lines and TensorBoard events; on the first process alone."""

    def __init__(self, args: argparse.Namespace, first_step: int):
        self.on = jax.process_index() == 0
        self.console = Console(quiet=args.quiet or not self.on)
        self.print = self.console.print
        self.events = Events(args.work_dir, first_step)
        self.path = args.work_dir / "metrics.jsonl"
        if self.on and self.path.exists():  # without what came after the last checkpoint
            kept = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            kept = [line for line in kept if json.loads(line)["step"] <= first_step]
            write_whole(self.path, "".join(kept))

    def write(self, step: int, **values: float) -> None:
        self.events.add(step, **values)
        if self.on:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
