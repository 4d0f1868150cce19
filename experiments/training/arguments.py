"""Command lines: files of arguments, names that are nearly right, counts."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def tile_of(parser: argparse.ArgumentParser, sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    """The two sizes of `--tiles`: N is N x N; None without it."""
    if sizes and len(sizes) > 2:
        parser.error(f"--tiles {' '.join(map(str, sizes))} must be one size or two: 32, or 1 32.")
    return tuple(sizes) * (3 - len(sizes)) if sizes else None


def program() -> str:
    """The module that runs, as `python -m` takes it: 'experiments.studies.figure1'."""
    file = Path(sys.argv[0]).with_suffix("")
    inside = file.is_relative_to(ROOT)
    return ".".join(file.relative_to(ROOT).parts if inside else ("experiments", file.name))


class Parser(argparse.ArgumentParser):
    """An argument parser whose help fits a screen and starts with an example; it takes @FILE.

    `--help` shows the first line of the description, its example and the options but rare ones,
    a line each; `--help_all` shows everything. A file holds arguments as the command line has
    them, on any number of lines; what follows a # is a comment.
    """

    def __init__(self, description: str | None, **options: Any):
        self.rare: list[argparse.Action] = []
        super().__init__(
            prog=f"python -m {program()}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fromfile_prefix_chars="@",
            **options,
        )
        self.add_argument("--help_all", action=_HelpAll, nargs=0, rare=True)

    def add_argument(self, *names: Any, rare: bool = False, **options: Any) -> argparse.Action:
        """As in the standard library; a `rare` option is shown by `--help_all` alone."""
        action = super().add_argument(*names, **options)
        self.rare += [action] if rare else []
        return action

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return arg_line.partition("#")[0].split()

    def format_usage(self) -> str:
        return f"usage: {self.prog} ...; --help shows the options\n"

    def format_help(self) -> str:
        first, *rest = (self.description or "").split("\n\n")
        example = next((part for part in rest if part.startswith("    ")), None)
        shown = [x for x in self._actions if x not in self.rare and x.dest != "help"]
        rows = [(_written(action), _said(action)) for action in shown]
        width = min(max((len(name) for name, _ in rows), default=0), 26)
        lines = [f"  {name:<{width}}  {said}".rstrip() for name, said in rows]
        lines = [line if len(line) <= 80 else line[:79] + "…" for line in lines]
        rare = f", and {len(self.rare) - 1} more options" if len(self.rare) > 1 else ""
        more = f"  --help_all: the whole description{rare}"
        blocks = ["For example:", example, first, "\n".join(lines), more]
        return "\n\n".join(block for block in blocks if block) + "\n"


class _HelpAll(argparse.Action):
    """Prints the standard library's help, and leaves."""

    def __call__(self, parser: Any, *_: Any) -> None:
        print(super(Parser, parser).format_help())
        parser.exit()


def _written(action: argparse.Action) -> str:
    """How an option is written: its name, and what follows it."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0]
    kinds = {int: "N", at_least_one: "N", float: "X", Path: "PATH", existing: "FILE"}
    choices = "|".join(map(str, action.choices or []))
    value = "DIR" if action.dest.endswith("_dir") else kinds.get(action.type, "NAME")
    value = choices if 0 < len(choices) < 16 else value
    value += " ..." if action.nargs == "+" else ""
    return f"{action.option_strings[0]} {value}" if action.option_strings else action.dest


def _said(action: argparse.Action) -> str:
    """Its help, and its default."""
    default = None if isinstance(action.default, bool) else action.default
    if isinstance(default, Path):
        default = default.relative_to(ROOT) if default.is_relative_to(ROOT) else default
    elif isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    shown = f"({default})" if default is not None and action.nargs != 0 else ""
    return " ".join(filter(None, (shown, action.help)))


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
