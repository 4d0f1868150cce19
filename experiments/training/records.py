"""Records of runs: one JSON line each, appended to a file that is committed."""

import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from experiments.training.arguments import program

RESULTS = Path(__file__).parents[2] / "results"
# Of each seed, in a record of several.
OF_A_SEED = ("accuracy", "best_accuracy", "density", "R", "history")


def _commit() -> str:
    """Short hash of the checkout, with '+' if it has uncommitted changes of tracked files."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True)  # noqa: E731
    head = run("rev-parse", "--short", "HEAD")
    if head.returncode:
        return "unknown"
    changed = run("status", "--porcelain", "-uno", "--", ".", "../dstee_jax").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def provenance() -> dict[str, Any]:
    """Command, commit, device and versions."""
    options = [a for i, a in enumerate(sys.argv[1:]) if not _is_path(sys.argv[1:], i)]
    options = [re.sub(r"(^|=|@)[^=@ ]*/", r"\1", option) for option in options]  # names of files
    return {
        "command": f"python -m {program()} {shlex.join(options)}".strip(),
        "commit": _commit(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
    }


def _is_path(argv: list[str], i: int) -> bool:
    """Whether an argument is, or introduces, a directory of this machine."""
    paths = ("--data_dir", "--work_dir", "--results", "--picture")
    return argv[i].startswith(paths) or (i > 0 and argv[i - 1] in paths)


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one record, with its provenance, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record | provenance(), ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def find(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The last record of a file that has these settings; None without one, or without the file."""
    wanted = json.loads(json.dumps(settings))  # tuples are lists in a record
    runs = read(path) if path.exists() else []
    same = [run for run in runs if wanted.items() <= run.items()]
    return same[-1] if same else None


def by_seed(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of several seeds as a record of each, as tables take them."""
    if "seeds" not in run:
        return [run]
    shared = {name: value for name, value in run.items() if name not in ("seeds", *OF_A_SEED)}
    return [
        shared | {"seed": seed} | {name: run[name][i] for name in OF_A_SEED}
        for i, seed in enumerate(run["seeds"])
    ]


def mean_sd(values: Iterable[float], digits: int = 2) -> str:
    """'mean ± standard deviation' of a sample, or the value alone."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def group(records: Iterable[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    """Records by the values of some keys, in order of appearance."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return dict(groups)
