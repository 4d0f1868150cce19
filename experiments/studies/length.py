"""How the paper's claim depends on the length of training, and where it ends.

    python -m experiments.studies.length --data_dir DIR --minutes 60

A queue of runs that skips what is recorded in results/length.jsonl, so that it can be stopped and
continued: MLP 784-300-100-10 on MNIST at 98, 99 and 95%, 5 to 80 epochs, 8 seeds, of which 4
train at once; c on the last 10,000 training images; the ablation of DST-EE at 98% and 40 epochs;
MLP 3072-512-256-10 on CIFAR-10; and the convolutional `small` on CIFAR-10 for 160 epochs. Then
prints a table of accuracies and of differences to RigL, paired by seed, with their standard
errors. The 98% grid takes about 2 hours on 2 CPU cores, the whole queue about 14. `--parts`
chooses some; `--table FILE` prints a file of records again. The figure is
`python -m experiments.report.figures length`.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import mlp
from experiments.studies.queue import Run, add_queue_options, cifar_run, mlp_run, work_off
from experiments.training import records
from experiments.training.arguments import Parser

RIGL, DST_EE = "RigL", "DST-EE, c = 0.001"
ROWS: dict[str, tuple[str, ...]] = {
    "static": ("--method=static",),
    "SET": ("--method=set",),
    RIGL: ("--method=rigl",),
    "RigL, no regrowth": ("--method=rigl", "--no-regrow"),
    "DST-EE, c = 0.0001": ("--method=dst_ee", "--c=0.0001"),
    DST_EE: ("--method=dst_ee", "--c=0.001"),
    "DST-EE, c = 0.01": ("--method=dst_ee", "--c=0.01"),
    "DST-EE, scale-free, c = 0.1": ("--method=dst_ee", "--normalize", "--c=0.1"),
}
# One option changed at a time; the base is `DST_EE`, whose other rows change c.
ABLATION: dict[str, tuple[str, ...]] = {
    "DST-EE, c = 0": ("--method=dst_ee", "--c=0"),
    "DST-EE, regrowth": (*ROWS[DST_EE], "--regrow"),
    "DST-EE, counters from 0": (*ROWS[DST_EE], "--counter_init=zeros"),
    "DST-EE, stop 0.5": (*ROWS[DST_EE], "--stop=0.5"),
    "DST-EE, stop 1": (*ROWS[DST_EE], "--stop=1"),
    "RigL, stop 1": ("--method=rigl", "--stop=1"),
}
FEW = (RIGL, "RigL, no regrowth", DST_EE, "DST-EE, scale-free, c = 0.1")
AT_ONCE = 4  # seeds: more train no faster on 2 cores


class Part(NamedTuple):
    """Runs of `experiments.mlp`: every row at every length."""

    sparsity: float
    epochs: Sequence[int] = (5, 10, 20, 40, 80)
    rows: Mapping[str, tuple[str, ...]] = ROWS
    seeds: int = 8
    words: tuple[str, ...] = ()


ON_CIFAR = ("--dataset=cifar10", "--widths", "512", "256", "--note=CIFAR-10 (JPEG q75)")
C = {name: words for name, words in ROWS.items() if "dst_ee" in words[0]}
PARTS = {
    "mnist_98": Part(0.98),
    "ablation": Part(0.98, (40,), ABLATION),
    "c": Part(0.98, (40,), C | {RIGL: ROWS[RIGL]}, words=("--validation=10000",)),
    "mnist_99": Part(0.99, (10, 40)),
    "mnist_95": Part(0.95, (10, 40)),
    "cifar10": Part(0.98, (10, 40), {name: ROWS[name] for name in FEW}, 4, ON_CIFAR),
}
SMALL = {"RigL": ROWS[RIGL], "DST-EE": ROWS[DST_EE], "SET": ROWS["SET"]}


def runs_of(part: Part, shared: Sequence[str]) -> Iterator[Run]:
    """The runs of a part: all lengths of the first seeds, then of the next."""
    for first in range(0, part.seeds, AT_ONCE):
        seeds = map(str, range(first, min(first + AT_ONCE, part.seeds)))
        some = [*shared, f"--sparsity={part.sparsity}", *part.words, "--seeds", *seeds]
        for epochs in part.epochs:
            for words in part.rows.values():
                yield mlp_run(*some, f"--epochs={epochs}", *words)


def queue(args: argparse.Namespace) -> Iterator[Run]:
    """Every run of `--parts`, in order."""
    shared = [f"--results={args.results}", f"--data_dir={args.data_dir}"]
    for name in args.parts:
        if name == "small":
            shared += ["--model=small", "--sparsity=0.98", "--note=CIFAR-10 (JPEG q75)"]
            for seed in range(3):
                yield from (cifar_run(seed, *shared, *words) for words in SMALL.values())
        else:
            yield from runs_of(PARTS[name], shared)


@functools.cache
def _options() -> dict[str, tuple[str, Any]]:
    """Method and options of each row, as a record has them."""
    found = {name: mlp.settings(mlp.parse([*words])) for name, words in (ROWS | ABLATION).items()}
    found = json.loads(json.dumps(found))
    return {name: (row["method"], row["options"]) for name, row in found.items()}


def name_of(run: Mapping[str, Any]) -> str | None:
    """The row of a record; None if it is none."""
    wanted = (run["method"], run["options"])
    return next((name for name, options in _options().items() if options == wanted), None)


def by_row(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Row to seed to the record of that seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        name = name_of(run)
        if name is not None:
            found.setdefault(name, {}).update((one["seed"], one) for one in records.by_seed(run))
    return {name: found[name] for name in ROWS | ABLATION if name in found}


def gain(one: Mapping[int, Any], base: Mapping[int, Any]) -> tuple[float, float, int]:
    """Mean difference of accuracy over the seeds of both, its standard error, and their number."""
    gains = [one[seed]["accuracy"] - base[seed]["accuracy"] for seed in one if seed in base]
    if len(gains) < 2:
        return (gains or [float("nan")])[0], float("nan"), len(gains)
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5, len(gains)


def mean_gain(lengths: Collection[Mapping[str, Mapping[int, Any]]], name: str) -> str:
    """The gain over RigL as a mean over all lengths, ± its standard error over seeds.

    A seed has the same first weights at each length, so that its mean is one value.
    """
    if name == RIGL or not all(name in rows and RIGL in rows for rows in lengths):
        return ""
    seeds = set.intersection(*({*rows[name]} & {*rows[RIGL]} for rows in lengths))

    def means(row: str) -> dict[int, dict[str, float]]:
        of = {seed: [rows[row][seed]["accuracy"] for rows in lengths] for seed in seeds}
        return {seed: {"accuracy": statistics.mean(each)} for seed, each in of.items()}

    mean, error, _ = gain(means(name), means(RIGL))
    return f"{mean:+.2f} ± {error:.3f}"


def settings_of(runs: Sequence[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Records by (data, model, split, sparsity)."""
    return records.group(runs, "data", "model", "split", "sparsity")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Accuracy, R and the gain over RigL; a column for each length."""
    lines = []
    for (data, model, split, sparsity), some in settings_of(runs).items():
        by_length = {epochs: by_row(group) for epochs, group in lengths(some).items()}
        most = max(len(seeds) for rows in by_length.values() for seeds in rows.values())
        lines.append(
            f"{data}, {model}, {sparsity:.0%} sparse, {split} accuracy (%) at the end, mean ± "
            f"standard deviation, {most} seeds; in brackets the gain over RigL ± its standard "
            "error, paired by seed\n"
        )
        heads = [f"{epochs} epochs" for epochs in by_length]
        heads += ["mean gain"] if len(by_length) > 1 else []
        lines += [f"| method | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for name in ROWS | ABLATION:
            if any(name in rows for rows in by_length.values()):
                cells = [cell(rows, name, most) for rows in by_length.values()]
                cells += [mean_gain(by_length.values(), name)] if len(by_length) > 1 else []
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def lengths(runs: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Records by epochs, shortest first."""
    return {epochs: some for (epochs,), some in sorted(records.group(runs, "epochs").items())}


def cell(rows: Mapping[str, Mapping[int, Any]], name: str, most: int) -> str:
    """The accuracy of a row, its seeds if they are not the most, and its gain over RigL."""
    if name not in rows:
        return ""
    seeds = f" ({len(rows[name])} seeds)" if len(rows[name]) < most else ""
    text = records.mean_sd(one["accuracy"] for one in rows[name].values()) + seeds
    if name == RIGL or RIGL not in rows:
        return text
    mean, error, _ = gain(rows[name], rows[RIGL])
    return f"{text} [{mean:+.2f} ± {error:.2f}]"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(__doc__)
    add_queue_options(parser, "length.jsonl")
    names = [*PARTS, "small"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    args = parser.parse_args(argv)
    work_off(args, [*queue(args)], table)


if __name__ == "__main__":
    main()
