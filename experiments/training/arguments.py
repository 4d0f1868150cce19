"""Command lines: files of arguments, names that are nearly right, counts."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def program() -> str:
    """The module that runs, as `python -m` takes it: 'experiments.studies.figure1'."""
    file = Path(sys.argv[0]).with_suffix("")
    inside = file.is_relative_to(ROOT)
    return ".".join(file.relative_to(ROOT).parts if inside else ("experiments", file.name))


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the description's lines and takes @FILE.

    A file holds arguments as the command line has them, on any number of lines; what follows a
    # is a comment.
    """

    def __init__(self, description: str | None, **options: Any):
        super().__init__(
            prog=f"python -m {program()}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fromfile_prefix_chars="@",
            **options,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return arg_line.partition("#")[0].split()


def choice(valid: Sequence[str]) -> Callable[[str], str]:
    """An argparse type that takes one of `valid` and otherwise names the nearest."""

    def parse(text: str) -> str:
        if text in valid:
            return text
        near = difflib.get_close_matches(text, valid, n=3, cutoff=0.3) or list(valid)
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; nearest: {', '.join(near)}")

    return parse


def at_least_one(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more, as 5")
    return int(text)


def existing(text: str) -> Path:
    """An argparse type: the path of a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}: pass one of records")
    return path
