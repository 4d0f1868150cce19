"""Bytes that a compiled program sends between devices, read from its text.

    sent = collectives(jax.jit(f).lower(...).compile().as_text())

A collective in a loop's body counts as often as `trips` says, one in a branch of a conditional
under the conditional's branch, one in a fusion or call where it is called.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f64": 8}  # others by the number in their name


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # 'all-reduce', ...
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and shape of each array of its result
    branches: tuple[int, ...]  # which branch of each conditional around it, outermost first
    trips: int  # how often it runs at most

    @property
    def bytes(self) -> int:
        """Of its result on one device, in all trips."""
        sizes = [_size(dtype) * math.prod(shape) for dtype, shape in self.shapes]
        return self.trips * sum(sizes)


def _size(dtype: str) -> int:
    number = re.search(r"\d+", dtype)
    return _BYTES.get(dtype) or int(number.group()) // 8


def collectives(text: str, trips: int = 16) -> list[Collective]:
    """All collectives of an optimised HLO module.

    Args:
      text: `compiled.as_text()`.
      trips: how often a `while` without a known trip count runs at most; 16 for the bisection
        of 32-bit keys, two bits a pass. A loop whose body ends it runs once.
    """
    bodies, entry = _computations(text)
    return list(_walk(bodies, entry, (), 1, trips))


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
    bodies: dict[str, list[str]], name: str, branches: tuple[int, ...], times: int, trips: int
) -> Iterator[Collective]:
    for line in bodies[name]:
        found = re.search(rf" = (.*?) ({_KINDS})(-start)?\(", line)
        if found:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", found.group(1))
            sizes = [(t, tuple(int(n) for n in s.split(",") if n)) for t, s in shapes]
            yield Collective(found.group(2), sizes, branches, times)
        if " while(" in line:
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            body = re.search(r"body=%?([\w.\-]+)", line).group(1)
            condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)
            n = int(known.group(1)) if known else trips
            if _runs_once(bodies[condition], bodies[body]):
                n = 1
            yield from _walk(bodies, body, branches, times * n, trips)
            yield from _walk(bodies, condition, branches, times * (n + 1), trips)
        elif " conditional(" in line:
            both = re.search(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", line)
            if both:
                called = [both.group(2), both.group(1)]
            else:
                inside = re.search(r"branch_computations=\{(.*?)\}", line).group(1)
                called = [part.strip().lstrip("%") for part in inside.split(",")]
            for i, branch in enumerate(called):
                yield from _walk(bodies, branch, (*branches, i), times, trips)
        else:
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                if not found:
                    yield from _walk(bodies, called, branches, times, trips)


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
