"""Rows of a JSONL file, read line by line; every bad line is found before anything is made of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tasks.prepare.formats import BadRowError, bad_rows_error, to_messages
from tasks.prepare.rows import Row


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a UTF-8 file of one JSON object a line, in order, with line numbers from 1.

    A byte order mark, CRLF line ends and blank lines are taken.

    Raises:
        InputError: after the last line, when any row was bad: the first ten, and how many more.
    """
    faults: list[tuple[int, str]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = _decode(line, first=number == 1)
                if text.strip():
                    yield Row(number, *to_messages(_parse(text)))
            except BadRowError as fault:
                faults.append((number, str(fault)))
    if faults:
        raise bad_rows_error(str(path), faults)


def _decode(line: bytes, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start + 1} of the line; save as UTF-8") from None


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_not_a_number)
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON at column {error.colno}: {error.msg}; mend or remove the line") from None
    except RecursionError:
        raise BadRowError("nested too deeply; a row needs no more than a list of turns") from None
    except BadRowError:
        raise
    except ValueError as error:
        raise BadRowError(f"not JSON that can be read: {error}; mend or remove the line") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadRowError(f"has the key '{twice}' twice; keep one")
    return keys


def _not_a_number(constant: str) -> NoReturn:
    raise BadRowError(f"has {constant}, which is not JSON; write a string")
