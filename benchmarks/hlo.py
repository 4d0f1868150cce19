"""The instructions of a compiled program, read from its text (optimised HLO).

    for instruction in instructions(jax.jit(f).lower(...).compile().as_text()): ...

Each with how often it runs: one in a loop's body as often as the loop goes round, one in a branch
under its branch, one in a fusion or call where it is called.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f64": 8}  # others by the number in their name


class Instruction(NamedTuple):
    """One instruction, where it is called."""

    line: str
    opcode: str  # 'fusion', 'copy', 'all-reduce-start', ...
    result: str  # its type: '(f32[4,8]{1,0}, u32[])'
    branches: tuple[int, ...]  # which branch of each conditional around it, outermost first
    trips: int  # how often it runs at most
    fused: bool  # whether it is within a fusion
    rounds: int | None = None  # of a loop, None if its end depends on data

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array of its result."""
        found = re.findall(r"(\w+)\[([\d,]*)\]", self.result)
        return [(t, tuple(int(n) for n in s.split(",") if n)) for t, s in found]

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(_size(dtype) * math.prod(shape) for dtype, shape in self.shapes)


def instructions(text: str, trips: int = 16) -> list[Instruction]:
    """All instructions of an optimised HLO module that may run.

    Args:
      text: `compiled.as_text()`.
      trips: how often a `while` without a known trip count runs at most; 16 for the bisection
        of 32-bit keys, two bits a pass. A loop whose body ends it runs once.
    """
    bodies, entry = _computations(text)
    return list(_walk(bodies, entry, (), 1, trips, fused=False))


def _size(dtype: str) -> int:
    number = re.search(r"\d+", dtype)
    return _BYTES.get(dtype) or (int(number.group()) // 8 if number else 0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]],
    name: str,
    branches: tuple[int, ...],
    times: int,
    trips: int,
    fused: bool,
) -> Iterator[Instruction]:
    for line in bodies[name]:
        found = re.search(r" = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
        if not found:
            continue
        opcode, rounds = found.group(2), None
        if opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", line).group(1)
            condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)
            rounds = _rounds(line, bodies[condition], bodies[body])
        yield Instruction(line, opcode, found.group(1), branches, times, fused, rounds)
        if opcode == "while":
            n = trips if rounds is None else rounds
            yield from _walk(bodies, body, branches, times * n, trips, fused)
            yield from _walk(bodies, condition, branches, times * (n + 1), trips, fused)
        elif opcode == "conditional":
            both = re.search(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", line)
            if both:
                called = [both.group(2), both.group(1)]
            else:
                inside = re.search(r"branch_computations=\{(.*?)\}", line).group(1)
                called = [part.strip().lstrip("%") for part in inside.split(",")]
            for i, branch in enumerate(called):
                yield from _walk(bodies, branch, (*branches, i), times, trips, fused)
        elif opcode in ("fusion", "call", "async-start", "custom-call"):
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                inside = fused or opcode == "fusion"
                yield from _walk(bodies, called, branches, times, trips, inside)


def _rounds(line: str, condition: list[str], body: list[str]) -> int | None:
    """How often a loop goes round: as the compiler says, or as a counter's bound does."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known.group(1))
    if _runs_once(condition, body):
        return 1
    bound = re.search(r" compare\(%[\w.\-]+, (%[\w.\-]+)\), direction=LT", _root(condition))
    number = bound and re.search(
        re.escape(bound.group(1)) + r" = s32\[\]\S* constant\((\d+)\)", "\n".join(condition)
    )
    return int(number.group(1)) if number else None


def _runs_once(condition: list[str], body: list[str]) -> bool:
    """Whether a loop goes on by a flag that its body sets to false."""
    flag = re.search(r"get-tuple-element\(.*\), index=(\d+)", _root(condition))
    if not flag or " tuple(" not in _root(body):
        return False
    made = {line.split(" = ")[0].strip(): line for line in body if " = " in line}
    name = re.findall(r"%[\w.\-]+", _root(body).split(" tuple(")[1])[int(flag.group(1))]
    while copied := re.search(r" copy\((%[\w.\-]+)", made[name]):
        name = copied.group(1)
    return "constant(false)" in made[name]


def _root(lines: list[str]) -> str:
    return next(line for line in lines if "ROOT " in line)
