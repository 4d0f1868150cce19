"""What the programs of a TPU or an H100 take, from their compilers: nothing is run.

    python -m benchmarks.compiled --target tpu:v5e:4x4 --programs 'optimizer.vgg19.*'

Needs the extra `compile`, and no accelerator. Targets: TPU slices (tpu:v4:2x2x1, tpu:v5e:16x16,
tpu:v6e:4x4) and gpu:h100, gpu:h100x8. `--list` names the programs; a name may have wildcards.
Each program is a line of results/compiled.jsonl; what is recorded there for this version of jax
is not compiled again, and

    python -m benchmarks.compiled --table results/compiled.jsonl

prints the tables. A layer or an optimizer takes seconds on 2 CPU cores, a ResNet-50's training
step minutes, everything for one target about an hour.

compile: seconds of CPU, on all cores, from tracing to the end. Bytes accessed and time are the TPU
compiler's own estimates, a loop's body counted once; it has none for a GPU. in a row: collectives
that wait for one another, at most. The end of an open loop depends on data: on a GPU each of its
rounds asks the host. Copies: of a megabyte and more, within the main memory.
"""

import argparse
import contextlib
import fnmatch
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import targets
from benchmarks.collectives import KINDS
from benchmarks.hlo import Instruction, instructions
from benchmarks.programs import Program, programs
from experiments.training import records
from experiments.training.arguments import Parser, existing

LARGE = 2**20  # bytes of an array whose copy is counted


def compiled(program: Program) -> tuple[Any, float]:
    """A program compiled, and the seconds of CPU that it took."""
    with no_cache():
        begin = time.process_time()
        done = program.function.trace(*program.args).lower().compile()
        return done, time.process_time() - begin


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """No cache of compiled programs: it cannot read those for other machines."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # the setting is read again
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def figures(done: Any, large: int = LARGE) -> dict[str, Any]:
    """What a compiled program takes: bytes, and counts of what can be slow.

    Args:
      done: a `jax.stages.Compiled`.
      large: bytes of an array whose copy is counted.
    """
    memory, cost = done.memory_analysis(), done.cost_analysis() or {}
    found = instructions(done.as_text())
    sent = [x for x in found if x.opcode.removesuffix("-start") in KINDS]
    loops = [x for x in found if x.opcode == "while"]
    return {
        "code": memory.generated_code_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": getattr(memory, "peak_memory_in_bytes", 0),
        "accessed": int(cost.get("bytes accessed", 0)),
        "seconds": cost.get("optimal_seconds", 0.0),
        "collectives": len(sent),
        "sent": sum(x.trips * x.bytes for x in sent),
        "in_a_row": sum(x.trips for x in sent),
        "kinds": sorted({x.opcode.removesuffix("-start") for x in sent}),
        "loops": len(loops),
        "endless": sum(x.rounds is None for x in loops),
        "conditionals": sum(x.opcode == "conditional" for x in found),
        "copies": sum(is_copy(x) and x.bytes >= large for x in found),
        "gathers": sum(x.opcode in ("gather", "scatter") for x in found),
        "fusions": sum(x.opcode == "fusion" and not x.fused for x in found),
    }


def is_copy(instruction: Instruction) -> bool:
    """Whether it copies an array within the main memory (S(1) is a TPU's own)."""
    return instruction.opcode == "copy" and not instruction.fused and "S(1)" not in instruction.line


def row(record: dict[str, Any], columns: Sequence[str]) -> str:
    """A record as a line of a table."""
    cells = {"compile s": f"{record['compile']:.1f}"}
    cells |= {name: megabytes(record[name]) for name in MEGABYTES}
    cells["ms"] = f"{1e3 * record['seconds']:.2f}" if record["seconds"] > 0 else ""
    cells |= {"in a row": str(record["in_a_row"])} if record["collectives"] else {}
    open_ = f" ({record['endless']} open)" if record["endless"] else ""
    cells["loops"] = f"{record['loops']}{open_}"
    cells |= {name: str(record[name]) for name in ("collectives", "conditionals", "copies")}
    return f"| {record['program']} | " + " | ".join(cells.get(name, "") for name in columns) + " |"


MEGABYTES = ("code", "arguments", "outputs", "aliased", "temporary", "peak", "accessed", "sent")
COLUMNS = ("compile s", *MEGABYTES[:-1], "ms", "collectives", "sent", "in a row", "loops")
COLUMNS += ("conditionals", "copies")
SHORT = tuple(name for name in COLUMNS if name not in ("outputs", "aliased", "ms", "conditionals"))


def megabytes(n: int) -> str:
    """Bytes as MB, with as many digits as mean something."""
    return f"{n / 1e6:,.{0 if n >= 1e8 else 1 if n >= 1e6 else 3}f}" if n else ""


def table(runs: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """A table for each target and version of jax; sizes in MB."""
    lines = []
    latest = {(r["target"], r["versions"]["jax"], r["program"]): r for r in runs}.values()
    for (target, jax_), group in records.group(
        [r | {"jax": r["versions"]["jax"]} for r in latest], "target", "jax"
    ).items():
        lines += [f"{target}, jax {jax_}; MB\n", "| program | " + " | ".join(columns) + " |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        lines += [row(record, columns) for record in sorted(group, key=lambda r: r["program"])] + [
            ""
        ]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser, names = Parser(__doc__), list(programs())
    add = parser.add_argument
    add("--target", nargs="+", default=["tpu:v5e:4x4"], help=targets.EXAMPLES)
    add("--programs", nargs="+", default=["optimizer.vgg19.*", "selection.*", "product.*"])
    add("--list", action="store_true", help="the names of the programs, and leave")
    add("--again", action="store_true", help="compile what is recorded, too")
    add("--results", type=Path, default=records.RESULTS / "compiled.jsonl")
    add("--table", type=existing, help="of records: print, compile nothing")
    add("--short", action="store_true", help="leave out columns that seldom say something")
    args = parser.parse_args(argv)
    for pattern in args.programs:
        if not fnmatch.filter(names, pattern):
            parser.error(f"--programs {pattern} names none of: {', '.join(names)}.")
    args.names = [n for n in names if any(fnmatch.fnmatch(n, p) for p in args.programs)]
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse(argv)
    if args.list:
        print("\n".join(programs()))
        return
    if args.table:
        print(table(records.read(args.table), SHORT if args.short else COLUMNS))
        return
    try:
        for target in args.target:
            targets.devices_of(target)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    for target in args.target:
        print(f"{target}, jax {jax.__version__}; MB\n| program | " + " | ".join(COLUMNS) + " |")
        for name in args.names:
            settings = {"target": target, "program": name}
            done = records.find(args.results, settings)
            if args.again or not done or done["versions"]["jax"] != jax.__version__:
                executable, seconds = compiled(programs()[name](target=target))
                done = settings | {"compile": round(seconds, 1)} | figures(executable)
                records.append(args.results, done)
                jax.clear_caches()
            print(row(done, COLUMNS), flush=True)


if __name__ == "__main__":
    main()
