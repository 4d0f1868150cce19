"""Text that every machine with Python has, as bytes in three parts.

The interpreter's own documentation: the topics of `help()` and the docstrings of the standard
library's top-level modules, about 1.2 MB. Python versions differ in it: `describe` gives a hash.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Text(NamedTuple):
    """The bytes of each part, uint8."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def python_documents() -> dict[str, str]:
    """Every topic and every module's docstrings by name, without what an earlier one says.

    Topics quote each other and docstrings repeat. From the longest document to the shortest, a
    paragraph that has occurred is left out, whatever its spaces and line breaks.
    """
    documents = {f"topic {name}": text for name, text in topics.items()}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, _DOCUMENTED))
        documents[f"module {path.stem}"] = "\n\n".join(text for text in found if text)
    seen, result = set(), {}
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        new = []
        for paragraph in documents[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                new.append(paragraph)
        if new:
            result[name] = "\n\n".join(new)
    return result


def split(documents: Mapping[str, str]) -> Text:
    """Each document in one part, 80, 10 and 10% of the characters up to a document's length.

    Documents are ordered by the SHA-256 of their names; where one begins decides its part.
    """
    total, begin = sum(map(len, documents.values())), 0
    parts: dict[str, list[str]] = {part: [] for part in SHARES}
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        first, second = SHARES["train"], SHARES["train"] + SHARES["validation"]
        share = begin / total
        part = "train" if share < first else "validation" if share < second else "test"
        parts[part].append(documents[name])
        begin += len(documents[name])
    joined = ("\n\n".join(texts).encode() for texts in parts.values())
    return Text(*(np.frombuffer(text, np.uint8) for text in joined))


def read(files: Iterable[Path]) -> Text:
    """The first 80% of the files' bytes one after the other, the next 10 and the last 10%."""
    for file in (files := list(files)):
        if not file.is_file():
            raise FileNotFoundError(f"no text at {file}: pass --text the path of a file.")
    whole = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    cuts = np.cumsum([round(SHARES[part] * len(whole)) for part in ("train", "validation")])
    return Text(*np.split(whole, cuts))


def load(files: Iterable[Path] | None, length: int) -> Text:
    """`files`, or Python's documentation where there are none, checked to hold the windows.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a part has fewer bytes than a window of `length` and the byte after it.
    """
    text = read(files) if files else split(python_documents())
    for name, part in text._asdict().items():
        if len(part) <= length:
            raise ValueError(
                f"the {name} part has {len(part)} bytes, too few for windows of --length "
                f"{length}: pass more text, or a smaller --length."
            )
    return text


def describe(text: Text) -> dict[str, object]:
    """Bytes of each part, and a hash of all: what a record says of its text."""
    digest = hashlib.sha256(b"".join(part.tobytes() for part in text)).hexdigest()[:12]
    return {"bytes": {name: len(part) for name, part in text._asdict().items()}, "sha256": digest}


def windows(part: np.ndarray, length: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A part cut into windows side by side, in which every byte is predicted once.

    A window's byte is predicted from the bytes before it in the window and one before that (a
    newline before the first of the part). The last windows are filled up and not counted.

    Returns:
      inputs and targets (int32) and whether each target counts (bool), (n, batch, length).
    """
    shape = (-(-len(part) // (length * batch)), batch, length)
    targets = np.zeros(np.prod(shape), np.int32)
    targets[: len(part)] = part
    inputs = np.concatenate([[ord("\n")], targets[:-1]]).astype(np.int32)
    counted = np.arange(len(targets)) < len(part)
    return inputs.reshape(shape), targets.reshape(shape), counted.reshape(shape)
