"""Where rows come from: a file, a folder of files, a dataset on the hub, or the one built in."""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.config import DataSettings, MappingSettings
from tasks.errors import InputError
from tasks.models.hub import is_hub_name
from tasks.prepare.delimited import read_delimited
from tasks.prepare.files import DataFile, data_file, folder_files, suffixes
from tasks.prepare.formats import Forms
from tasks.prepare.json_array import read_json
from tasks.prepare.jsonl import read_jsonl
from tasks.prepare.opening import unreadable
from tasks.prepare.pairs import read_pairs
from tasks.prepare.parquet import read_parquet
from tasks.prepare.rows import Note, Row, Stream

BUILT_IN = "stdlib"

READERS: dict[str, Callable[[DataFile, Forms], Stream]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": read_parquet,
    ".txt": read_pairs,
}


def check_source(data: DataSettings) -> None:
    """What can be said of `data.source` without reading it; cheap enough for before a flow starts.

    Raises:
        InputError: no such file, built-in name or hub name; an unreadable or empty file; a suffix not
            taken; a folder without data; a setting that this source does not have.
    """
    if not is_hub(data) and (data.subset or data.revision):
        setting = "subset" if data.subset else "revision"
        raise InputError(f"data.{setting}: only hub datasets have one, {data.source} is none; remove it")
    if data.source == BUILT_IN:
        if data.mapping != MappingSettings():
            raise InputError(f"data.mapping: the rows of '{BUILT_IN}' need none; remove it")
    elif is_hub(data):
        from tasks.prepare.hub import check_hub

        check_hub(data)
    else:
        for file in _files(data)[0]:
            if not os.access(file.path, os.R_OK):
                raise InputError(f"{file.path}: you may not read it; make the file readable")
            if not file.path.stat().st_size:
                raise InputError(f"{file.path}: is empty; put rows into it or remove it")


def read_source(data: DataSettings) -> Stream:
    """The rows of a checked source, in its order; given splits in the order test, valid, train.

    Nothing is held but the row being read. Where a source gives only training rows, they carry no split.

    Raises:
        InputError: a file cannot be read to its end.
    """
    forms = Forms(data.mapping)
    if data.source == BUILT_IN:
        yield from _stdlib_rows()
    elif is_hub(data):
        from tasks.prepare.hub import read_hub

        yield from read_hub(data, forms)
    else:
        files, notes = _files(data)
        yield from notes
        for file in files:
            yield from READERS[file.suffix](file, forms)


def source_inputs(data: DataSettings) -> dict[str, Any]:
    """What a source's rows depend on beside the settings, as plain values: contents, not paths."""
    if data.source == BUILT_IN:
        digest = hashlib.sha256()
        for row in _stdlib_rows():
            digest.update(row.identity.encode())
        return {"built_in": BUILT_IN, "python": platform.python_version(), "sha256": digest.hexdigest()}
    if is_hub(data):
        from tasks.prepare.hub import hub_inputs

        return hub_inputs(data)
    files, notes = _files(data)
    contents = [[file.name, file.suffix, file.split, _sha256(file)] for file in files]
    return {"files": contents, "not_read": [note.detail for note in notes]}


def is_hub(data: DataSettings) -> bool:
    """Whether no such path is there, and the name can be that of a hub dataset.

    Of a name like `data/train.jsonl`, or one in a folder that is there, a path was meant.
    """
    path = Path(data.source).expanduser()
    if data.source == BUILT_IN or path.exists() or path.parent.is_dir():
        return False
    return is_hub_name(data.source) and data_file(path) is None


def _files(data: DataSettings) -> tuple[list[DataFile], list[Note]]:
    path = Path(data.source).expanduser()
    try:
        if path.is_dir():
            return folder_files(path)
        if not path.exists():
            raise InputError(f"{path}: no such file, folder or built-in dataset; {_nearest(path)}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make it readable") from None
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; give a file that ends in {suffixes()}")
    file = data_file(path)
    if file is None:
        raise InputError(f"{path}: '{path.suffix}' files are not taken; give one that ends in {suffixes()}")
    return [file], []


def _stdlib_rows() -> tuple[Row, ...]:
    from tasks.prepare.stdlib import stdlib_rows

    return stdlib_rows()


def _sha256(file: DataFile) -> str:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error, "") from None


def _nearest(path: Path) -> str:
    beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
    if close := difflib.get_close_matches(path.name, [*beside, BUILT_IN], n=1):
        return f"did you mean '{close[0] if close[0] == BUILT_IN else path.parent / close[0]}'?"
    return f"give a file that ends in {suffixes()}, a hub dataset's owner/name, or '{BUILT_IN}'"
