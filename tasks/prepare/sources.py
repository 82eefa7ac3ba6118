"""Where rows come from: a JSONL file or a dataset built in."""

from __future__ import annotations

import difflib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.prepare.rows import Row

BUILT_IN = ("stdlib",)
SUFFIXES = (".jsonl",)


def check_source(data: DataSettings) -> None:
    """What can be said of `data.source` without reading it; cheap enough for before a flow starts.

    Raises:
        InputError: no such file or built-in name, a folder, an empty file, or a suffix not taken.
    """
    if data.source in BUILT_IN:
        return
    path = Path(data.source).expanduser()
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file in it that ends in {_suffixes()}")
    if not path.exists():
        raise InputError(f"{path}: no such file or built-in dataset; {_nearest(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: '{path.suffix}' files are not taken; give one that ends in {_suffixes()}")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; give a file that ends in {_suffixes()}")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty; give a file with one row a line")


def read_source(source: str) -> Iterator[Row]:
    """The rows of a checked source, in its order.

    Raises:
        InputError: the file cannot be opened, or has bad rows.
    """
    if source == "stdlib":
        from tasks.prepare.stdlib import stdlib_rows

        yield from stdlib_rows()
    else:
        from tasks.prepare.jsonl import read_jsonl

        try:
            yield from read_jsonl(Path(source).expanduser())
        except OSError as error:
            raise InputError(f"{source}: {error.strerror}; make the file readable") from None


def source_inputs(source: str) -> dict[str, Any]:
    """What a source's rows depend on, as plain values: the file's content, or the Python that runs."""
    if source == "stdlib":
        digest = hashlib.sha256()
        for row in read_source(source):
            digest.update(row.identity.encode())
        return {"built_in": source, "python": platform.python_version(), "sha256": digest.hexdigest()}
    try:
        with Path(source).expanduser().open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; make the file readable") from None


def _suffixes() -> str:
    return " or ".join(SUFFIXES)


def _nearest(path: Path) -> str:
    beside = (
        [other.name for other in path.parent.glob("*") if other.is_file()] if path.parent.is_dir() else []
    )
    if close := difflib.get_close_matches(path.name, [*beside, *BUILT_IN], n=1):
        name = close[0] if close[0] in BUILT_IN else path.parent / close[0]
        return f"did you mean '{name}'?"
    return f"give a {_suffixes()} file, or the built-in {' or '.join(BUILT_IN)}"
