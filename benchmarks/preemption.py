"""Is anything lost when a run is killed? `experiments.imagenet`, with SIGKILL at random moments.

    python -m benchmarks.preemption --kills 100

A small network trains on pieces of photographs in ImageNet's format, first undisturbed, twice;
then the same command again and again, killed with its workers while it starts, trains, or saves
(every second kill waits for a save to begin), and started again until it reaches the end.
Parameters, masks, counters, moments and the accuracy must then be those of the undisturbed run,
bit for bit. When a run reaches its end before all kills are done, another one begins. Appends a
line to results/preemption.jsonl; the exit status is 1 if anything differs.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from experiments.training import records
from experiments.training.arguments import at_least_one
from experiments.training.checkpoints import Checkpoints, by_name
from experiments.training.progress import bar, conclude, shown
from tests.tiny_datasets import write_imagenet

DEVICES = 2
IMAGES = {"train": 40, "validation": 16}


class Kill(NamedTuple):
    """A kill: what the run was at, and after how many steps it last saved."""

    phase: str  # 'starting' (it has saved nothing yet), 'training' or 'saving'
    saved: int


class Trial:
    """A directory of data and of runs, the settings of a run, and how long it takes."""

    def __init__(self, directory: Path, args: argparse.Namespace):
        self.directory, self.args = directory, args
        write_imagenet(directory / "data", IMAGES)
        self.times: tuple[float, float] = (0.0, 0.0)  # seconds before the first save, and after

    def start(self, work_dir: Path) -> subprocess.Popen:
        """The run in that directory, from its last checkpoint; a process group of its own."""
        work_dir.mkdir(exist_ok=True)
        options = {"model": "small", "image_size": 16, "batch": 8, "warmup_epochs": 0.4, "every": 3}
        options |= {"steps": self.args.steps, "save_every": self.args.save_every, "sparsity": 0.9}
        options |= {"log_every": 10, "eval_every": 10_000, "workers": 1, "work_dir": work_dir}
        options |= {"data_dir": self.directory / "data", "results": work_dir / "runs.jsonl"}
        command = [sys.executable, "-m", "experiments.imagenet"]
        command += [f"--{name}={value}" for name, value in options.items()]
        flags = f"--xla_force_host_platform_device_count={DEVICES}"
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "programs")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with (work_dir / "output.txt").open("a") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | cache | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                start_new_session=True,
            )

    def undisturbed(self, work_dir: Path) -> None:
        """Run to the end, and measure how long that takes."""
        begin = time.monotonic()
        process = self.start(work_dir)
        while process.poll() is None and not saved(work_dir):
            time.sleep(0.01)
        first = time.monotonic()
        finish(process, work_dir)
        self.times = (first - begin, time.monotonic() - first)

    def killed(self, work_dir: Path, rng: random.Random, in_save: bool) -> Kill | None:
        """Start the run and kill it at a random moment; None if it reached its end before."""
        before, left_over = saved(work_dir), saving(work_dir)
        process, begin = self.start(work_dir), time.monotonic()
        left = 1 - before / self.args.steps
        wait = rng.uniform(0, self.times[0] + left * self.times[1])
        while process.poll() is None:
            late = time.monotonic() - begin > wait
            if late and (not in_save or saving(work_dir) - left_over):
                time.sleep(rng.uniform(0, 0.02) if in_save else 0)
                break
            time.sleep(0.001)
        if process.poll() is not None:
            finish(process, work_dir)
            return None
        at_save = saving(work_dir) - left_over
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = saved(work_dir)
        return Kill("saving" if at_save else "training" if after > before else "starting", after)


def finish(process: subprocess.Popen, work_dir: Path) -> None:
    """Wait for the end of a run; what it printed is the error if it failed."""
    if process.wait() != 0:
        raise SystemExit(f"error: the run failed.\n{(work_dir / 'output.txt').read_text()}")


def entries(work_dir: Path) -> Iterator[str]:
    """Names in the directory of checkpoints."""
    try:
        yield from os.listdir(work_dir / "checkpoints")
    except FileNotFoundError:
        return


def saved(work_dir: Path) -> int:
    """The step of the last complete checkpoint, 0 without one."""
    return max((int(name) for name in entries(work_dir) if name.isdigit()), default=0)


def saving(work_dir: Path) -> set[int]:
    """Inodes of checkpoints that are not complete, whose names say so: a save that was killed
    leaves one, and a save that goes on is one.
    """
    found = set()
    for name in entries(work_dir):
        with contextlib.suppress(FileNotFoundError):  # it has just been completed
            found |= {os.stat(work_dir / "checkpoints" / name).st_ino} if "tmp" in name else set()
    return found


def outcome(work_dir: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint by name, and the accuracy."""
    record = records.read(work_dir / "runs.jsonl")[-1]
    arrays = by_name(Checkpoints(work_dir, keep=True).restore_plain())
    return arrays | {"accuracy": np.float64(record["accuracy"])}


def differing(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Names of arrays that are not the same, bit for bit."""
    bits = lambda x: (x.shape, x.dtype, x.tobytes())  # noqa: E731
    names = sorted(got.keys() | expected.keys())
    return [
        name
        for name in names
        if name not in got or name not in expected or bits(got[name]) != bits(expected[name])
    ]


def soak(trial: Trial, console: Console) -> dict[str, Any]:
    """Kill runs until there were as many kills as asked for; returns what came out."""
    args, rng, kills = trial.args, random.Random(trial.args.seed), []
    for name in ("first", "undisturbed"):  # the first one compiles
        trial.undisturbed(trial.directory / name)
    expected, different = outcome(trial.directory / "undisturbed"), {}
    if wrong := differing(outcome(trial.directory / "first"), expected):
        raise SystemExit(f"error: two undisturbed runs differ in {', '.join(wrong)}.")
    runs, per_run = 0, []
    with bar(console) as progress:
        task = progress.add_task("kills", total=args.kills)
        while len(kills) < args.kills:
            runs += 1
            work_dir, here = trial.directory / f"run_{runs}", 0
            while len(kills) < args.kills:
                kill = trial.killed(work_dir, rng, in_save=len(kills) % 2 == 1)
                if kill is None:
                    break
                kills.append(kill)
                here += 1
                progress.advance(task)
                console.print(f"run {runs}: killed while {kill.phase}, saved at {kill.saved}")
            else:
                finish(trial.start(work_dir), work_dir)
            per_run.append(here)
            if wrong := differing(outcome(work_dir), expected):
                different[runs] = wrong
                console.print(f"run {runs} differs in {', '.join(wrong)}")
    return {
        "kills": len(kills),
        **dict(sorted(collections.Counter(kill.phase for kill in kills).items())),
        "runs": runs,
        "kills_of_a_run": per_run,
        "identical": runs - len(different),
        "different": different,
        "arrays": len(expected),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=at_least_one, default=100)
    parser.add_argument("--steps", type=at_least_one, default=300, help="of a run")
    parser.add_argument("--save_every", type=at_least_one, default=5, help="steps")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=records.RESULTS / "preemption.jsonl")
    args = parser.parse_args(argv)
    console, begin = Console(), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        found = soak(Trial(Path(directory), args), console)
    settings = {name: getattr(args, name) for name in ("steps", "save_every", "seed")}
    seconds = {"seconds": round(time.monotonic() - begin)}
    records.append(args.results, settings | {"devices": DEVICES} | found | seconds)
    what = f"{found['kills']} kills: {found['identical']} of {found['runs']} runs bit-identical"
    conclude(console, what, record=args.results)
    if found["different"]:
        raise SystemExit(f"error: runs differ: {found['different']}; see {shown(args.results)}.")


if __name__ == "__main__":
    main()
