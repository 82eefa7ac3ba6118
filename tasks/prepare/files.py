"""The data files of a source: one file, or those of a folder with the splits their names give."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.errors import InputError
from tasks.prepare.faults import BadRowError
from tasks.prepare.rows import Note, Unused

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
READING_ORDER = ("test", "valid", "train", None)  # what is held out is known before training rows come
LONGEST_TEXT = 2000  # characters kept of a row that is not used

SPLIT_NAME = re.compile(r"(train|valid|validation|val|dev|test)(?![^\W\d_])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a source: what its rows carry.

    Attributes:
        name: where the source has several parts, the file's or hub split's name; else empty.
        split: the split its rows are put in, one of `rows.SPLITS`, or None.
    """

    name: str = ""
    split: str | None = None

    def unused(self, line: int, fault: BadRowError, text: str) -> Unused:
        """A bad row; of its text the beginning, with nothing that cannot be written as UTF-8."""
        beginning = text[:LONGEST_TEXT].encode("utf-8", "replace").decode("utf-8")
        return Unused(self.name, line, fault.kind, str(fault), beginning)

    def note(self, line: int, kind: str, detail: str = "") -> Note:
        """An oddity of this part."""
        return Note(self.name, line, kind, detail)


@dataclass(frozen=True, kw_only=True)
class DataFile(Part):
    """A file of rows; `suffix` says how they are written, `compression` is a suffix too, or empty."""

    path: Path
    suffix: str
    compression: str = ""


def data_file(path: Path) -> DataFile | None:
    """The file as its suffixes describe it; None when they are none of those taken."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    compression = last if last in COMPRESSIONS else ""
    suffix = before if compression else last
    return DataFile(path=path, suffix=suffix, compression=compression) if suffix in SUFFIXES else None


def folder_files(folder: Path) -> tuple[list[DataFile], list[Note]]:
    """The data files of a folder in the order they are read, and a note for each entry that is not.

    Where any name begins with a split's (`train-00001.jsonl.gz`, `validation.csv`), only those files
    are read; else all are. Hidden files are neither read nor noted.

    Raises:
        InputError: no data files, or held-out files without training files.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [file for path in entries if path.is_file() and (file := data_file(path))]
    split = [replace(file, split=name) for file in files if (name := split_of(file.path.name))]
    read = _in_order(split, folder) if split else files
    if not read:
        raise InputError(f"{folder}: has no data files{_where_else(entries)}; they end in {suffixes()}")
    if len(read) > 1:
        read = [replace(file, name=file.path.name) for file in read]
    paths = {file.path for file in read}
    return read, [Note(path.name, 1, "file", path.name) for path in entries if path not in paths]


def split_of(name: str) -> str | None:
    """The split a file's or hub split's name begins with as a whole word."""
    match = SPLIT_NAME.match(name)
    if match is None:
        return None
    word = match[1].lower()
    return "valid" if word in ("validation", "val", "dev") else word


def suffixes() -> str:
    """The suffixes taken, for messages."""
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or one of these and {' or '.join(COMPRESSIONS)}"


def _in_order(files: list[DataFile], folder: Path) -> list[DataFile]:
    given = {file.split for file in files}
    if "train" not in given:
        names = ", ".join(file.path.name for file in files[:3])
        raise InputError(f"{folder}: has {names}, but no file whose name begins with 'train'; add one")
    if given == {"train"}:  # nothing is held out: as a single file, it is split by hash
        return [replace(file, split=None) for file in files]
    return sorted(files, key=lambda file: READING_ORDER.index(file.split))


def _where_else(entries: list[Path]) -> str:
    inside = [
        path.name for path in entries if path.is_dir() and any(data_file(inner) for inner in path.iterdir())
    ]
    return f" itself, but its folder '{inside[0]}' has" if inside else ""
