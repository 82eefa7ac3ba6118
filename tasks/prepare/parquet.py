"""Rows of a Parquet file, and of Arrow batches from wherever they come."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from tasks.errors import InputError
from tasks.prepare.faults import BadRowError, listed
from tasks.prepare.files import DataFile, Part
from tasks.prepare.formats import Forms
from tasks.prepare.opening import READ_ERRORS, open_bytes, unreadable
from tasks.prepare.rows import Stream

BATCH_ROWS = 256


def read_parquet(file: DataFile, forms: Forms) -> Stream:
    """The rows of a file, a batch at a time; a null is a missing value, within turns too.

    Only columns that are learnt are read. A row's line is its number, from 1.

    Raises:
        InputError: not Parquet, damaged, or without columns that a row could be made of.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    with _uncompressed(file) as stream:
        try:
            table = ParquetFile(stream, page_checksum_verification=True)
            columns, notes = table_columns(file, forms, table.schema_arrow.names, str(file.path))
            yield from notes
            for batch in table.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield from batch_rows(file, forms, batch, number)
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            place = f"{file.path}, after row {number}" if number else f"{file.path}"
            raise InputError(f"{place}: not Parquet, or damaged ({reason}); write or copy it again") from None


def table_columns(part: Part, forms: Forms, names: list[str], source: str) -> tuple[list[str], Stream]:
    """Of a table's columns those to read, and notes of the others."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{source}: has {listed(twice)} twice; rename or remove one")
    try:
        columns, notes = forms.table_columns(part, 1, names)
    except BadRowError as fault:
        raise InputError(f"{source}: {fault}") from None
    return columns, iter(notes)


def batch_rows(part: Part, forms: Forms, batch: Any, before: int) -> Stream:
    """The rows of an Arrow batch or table that `before` rows precede."""
    for number, row in enumerate(_values(batch), start=before + 1):
        if isinstance(row, BadRowError):
            yield part.unused(number, row, "")
        else:
            text = json.dumps(row, ensure_ascii=False, default=str)
            yield from forms.rows(part, number, {key: _without_nulls(row[key]) for key in row}, text)


def _values(batch: Any) -> Iterable[dict[str, Any] | BadRowError]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:  # Parquet files are not held to the UTF-8 their strings claim
        return [_value(batch.slice(place, 1)) for place in range(batch.num_rows)]


def _value(row: Any) -> dict[str, Any] | BadRowError:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return BadRowError("encoding", f"not UTF-8 ({error.reason}); write the file again with UTF-8 strings")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _uncompressed(file: DataFile) -> Iterator[IO[bytes]]:
    """The file itself, or a temporary copy decompressed: Parquet is read from its end."""
    try:
        with open_bytes(file) as stream:
            if not file.compression:
                yield stream
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(stream, copy)
                copy.seek(0)
                yield copy
    except READ_ERRORS as error:
        raise unreadable(file, error, "") from None
