"""Choose c, eps, drop fraction, every and stop on a validation split, never on the test set.

    python -m experiments.studies.sweep --data digits
    python -m experiments.studies.sweep --data cifar10 --data_dir DIR

Every method gets the same number of settings and the same seeds: random search on the digits
(25 minutes on 2 CPU cores), five settings on CIFAR-10 (network `small`, 4 epochs, 98%, one
seed; 15 minutes). Appends to results/sweep_DATA.jsonl, whose runs are skipped when started
again, and prints each method's best settings.
"""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import cifar, quickstart
from experiments.data import cifar as data
from experiments.training import records
from experiments.training.arguments import Parser, at_least_one
from experiments.training.progress import conclude, over

SHARED = {
    "every": [25, 50, 100, 200],
    "drop_fraction": [0.1, 0.2, 0.3, 0.5],
    "stop": [0.5, 0.75, 0.9, 1.0],
}
# The scale-free acquisition divides gradients by their layer's mean: its c has no unit.
OWN = {
    "static": {},
    "set": {},
    "rigl": {},
    "dst_ee": {"c": [1e-4, 3e-4, 1e-3, 3e-3], "eps": [0.1, 1.0]},
    "dst_ee_normalized": {"c": [0.03, 0.1, 0.3, 1.0], "eps": [0.1, 1.0]},
}


# A coarser look where a run takes a minute: around the digits' best and around RigL's defaults.
COARSE = [
    {"every": 100, "drop_fraction": 0.3, "stop": 0.75},
    {"every": 50, "drop_fraction": 0.5, "stop": 0.9},
    {"every": 100, "drop_fraction": 0.5, "stop": 0.9},
    {"every": 25, "drop_fraction": 0.5, "stop": 0.9},
    {"every": 50, "drop_fraction": 0.3, "stop": 0.75},
]


def draws(method: str, count: int, coarse: bool = False) -> list[dict[str, Any]]:
    """`count` different settings of a method; the shared ones are the same for every method."""
    if method == "static":
        return [{}]
    if coarse:
        c = {"dst_ee": [1e-3, 1e-4, 1e-3, 3e-4, 1e-4]}.get(method)
        return [row | ({"c": c[i]} if c else {}) for i, row in enumerate(COARSE[:count])]
    every = [dict(zip(SHARED, row, strict=True)) for row in itertools.product(*SHARED.values())]
    shared = random.Random(0).sample(every, count)
    own = random.Random(1)
    return [s | {k: own.choice(v) for k, v in OWN[method].items()} for s in shared]


def run_digits(method: str, sparsity: float, setting: dict[str, Any], seeds: int) -> list[float]:
    """Validation accuracy of each seed."""
    setting = dict(setting)
    if method == "dst_ee_normalized":
        method, setting["normalize"] = "dst_ee", True
    result = quickstart.train(method, sparsity, seeds, "validation", **setting)
    return [float(x) for x in result.accuracy[:, -1]]


def run_cifar(
    method: str, sparsity: float, setting: dict[str, Any], seeds: int, arrays: Any
) -> list[float]:
    """Validation accuracy of each seed after 4 epochs of the network `small`."""
    options = [f"--{name}={value}" for name, value in setting.items()]
    command = ["--model=small", "--epochs=4", "--split=validation", "--quiet"]
    command += [f"--method={method}", f"--sparsity={sparsity}", *options]
    args = cifar.parse(command)
    return [cifar.run(args, seed, arrays)["accuracy"] for seed in range(seeds)]


def report(path: Path, top: int = 3) -> str:
    """Each method's best settings by mean validation accuracy."""
    lines = []
    cells = records.group(records.read(path), "sparsity", "method")
    for (sparsity, method), runs in sorted(cells.items()):
        best = sorted(runs, key=lambda run: -np.mean(run["accuracies"]))
        spread = records.mean_sd([np.mean(run["accuracies"]) for run in runs])
        lines.append(f"{sparsity:.0%} {method}: {len(runs)} settings, {spread}")
        for run in best[:top]:
            lines.append(f"    {records.mean_sd(run['accuracies'])}  {run['setting']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument("--sparsity", nargs="+", type=float)
    parser.add_argument("--settings", type=int, help="draws for each method")
    parser.add_argument("--seeds", type=at_least_one)
    parser.add_argument("--report", action="store_true", help="print the report alone")
    args = parser.parse_args(argv)
    digits = args.data == "digits"
    path = records.RESULTS / f"sweep_{args.data}.jsonl"
    if not args.report:
        arrays = None if digits else data.load_splits("cifar10", args.data_dir, True)
        count = args.settings or (16 if digits else len(COARSE))
        seeds = args.seeds or (5 if digits else 1)
        done = [
            (r["method"], r["sparsity"], r["setting"])
            for r in (records.read(path) if path.exists() else [])
        ]
        methods = [m for m in OWN if digits or m != "dst_ee_normalized"]
        sparsities = args.sparsity or ([0.95, 0.98] if digits else [0.98])
        plan = [
            (m, s, row) for m in methods for s in sparsities for row in draws(m, count, not digits)
        ]
        console = Console()
        for i, (method, sparsity, setting) in enumerate(over(plan, args.data, console)):
            if (method, sparsity, setting) in done:
                continue
            if digits:
                accuracies = run_digits(method, sparsity, setting, seeds)
            else:
                accuracies = run_cifar(method, sparsity, setting, seeds, arrays)
            mean = np.mean(accuracies)
            console.print(f"{i + 1}/{len(plan)} {method} {sparsity:.0%} {setting}: {mean:.2f}")
            row = {"data": args.data, "split": "validation", "method": method, "sparsity": sparsity}
            records.append(path, row | {"setting": setting, "accuracies": accuracies})
    print(report(path))
    conclude(Console(), f"{len(records.read(path))} settings", record=path)


if __name__ == "__main__":
    main()
