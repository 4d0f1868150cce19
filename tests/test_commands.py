"""What the commands of experiments say of themselves: help, progress, and their last line."""

import importlib
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments.training import arguments, progress, records

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").rglob("*.py"))
COMMANDS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in FILES
    if "\ndef main(" in file.read_text()
]


def helped(command, option, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(command).main([option])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_starts_with_an_example(command, capsys):
    lines = helped(command, "--help", capsys).splitlines()
    assert len(lines) <= 40
    assert lines[0] == "For example:"
    assert lines[2].startswith(f"    python -m {command}")
    options = [line for line in lines if line.startswith("  --")]
    assert all(len(line) <= 80 for line in options)


def test_all_commands_are_seen():
    assert {"experiments.quickstart", "experiments.imagenet", "experiments.studies.length"} <= {
        *COMMANDS
    }
    assert len(COMMANDS) > 15


def test_all_options_are_in_the_long_help(capsys):
    text = helped("experiments.imagenet", "--help_all", capsys)
    short = helped("experiments.imagenet", "--help", capsys)
    assert "--lost_after" in text
    assert "--lost_after" not in short
    assert "SIGTERM saves and leaves" in text
    assert set(re.findall(r"--\w+", short)) <= set(re.findall(r"--\w+", text))


def test_a_line_of_the_help():
    parser = arguments.Parser("A program.\n\n    python -m program --size 3\n\nMore.")
    parser.add_argument("--size", type=int, default=0, help="of it " + "and so on " * 9)
    parser.add_argument("--slow", action="store_true", help="take care")
    parser.add_argument("--results", type=Path, default=records.RESULTS / "x.jsonl")
    parser.add_argument("--seldom", rare=True)
    lines = parser.format_help().splitlines()
    assert lines[:5] == ["For example:", "", "    python -m program --size 3", "", "A program."]
    size, slow, results = lines[6:9]
    assert size.startswith("  --size N        (0) of it and so on")
    assert size.endswith("…")
    assert len(size) == 80
    assert slow == "  --slow          take care"
    assert results == "  --results PATH  (results/x.jsonl)"
    assert lines[-1] == "  --help_all: the whole description, and 1 more options"


def on_a_terminal(terminal=True, **options):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, **options)


def test_a_bar_has_the_time_left_and_lines_come_above_it():
    console = on_a_terminal()
    for step in progress.over(range(3), "seed 0", console, done=2):
        console.print(f"epoch {step}")
    text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())  # without colours
    assert "seed 0" in text
    assert "2/5" in text
    assert "left" in text
    assert all(f"epoch {step}\n" in text for step in range(3))


@pytest.mark.parametrize("options", [{"terminal": False}, {"quiet": True}])
def test_no_bar_off_a_terminal(options):
    console = on_a_terminal(**options)
    assert list(progress.over("abc", "seed 0", console)) == ["a", "b", "c"]
    assert console.file.getvalue() == ""


def test_the_last_line(tmp_path):
    console = on_a_terminal(terminal=False)
    places = {"record": records.RESULTS / "x.jsonl", "checkpoints": None, "picture": tmp_path / "p"}
    progress.conclude(console, "rigl at 95%: 96.1%" + " right" * 30, **places)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("rigl at 95%: 96.1% right")
    assert line.endswith(f"; record in results/x.jsonl; picture in {tmp_path / 'p'}")
