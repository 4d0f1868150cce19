"""Bytes that a compiled program sends between devices, read from its text.

sent = collectives(jax.jit(f).lower(...).compile().as_text())
"""

from typing import NamedTuple

from benchmarks.hlo import Instruction, instructions

KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter")
KINDS += ("collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # 'all-reduce', ...
    shapes: list[tuple[str, tuple[int, ...]]]  # dtype and shape of each array of its result
    branches: tuple[int, ...]  # which branch of each conditional around it, outermost first
    trips: int  # how often it runs at most
    bytes: int  # of its result on one device, in all trips


def collectives(text: str, trips: int = 16) -> list[Collective]:
    """All collectives of an optimised HLO module; arguments as for `hlo.instructions`."""
    return [
        Collective(_kind(x), x.shapes, x.branches, x.trips, x.trips * x.bytes)
        for x in instructions(text, trips)
        if _kind(x) in KINDS
    ]


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")
