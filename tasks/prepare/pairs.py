"""Rows of a plain text file: a line that asks, then a line that answers; blank lines between pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tasks.prepare.faults import BadRowError
from tasks.prepare.files import DataFile
from tasks.prepare.formats import Forms
from tasks.prepare.lines import Line, text_lines
from tasks.prepare.rows import Note, Stream, Unused


def read_pairs(file: DataFile, forms: Forms) -> Stream:
    """The pairs of a UTF-8 file as rows of `question` and `answer`.

    Raises:
        InputError: the file cannot be read to its end.
    """
    for pair in _pairs(file):
        if not isinstance(pair, list):
            yield pair
        elif bad := [line for line in pair if isinstance(line, Unused)]:
            yield replace(bad[0], line=_number(pair[0]))
        elif len(pair) == 1:
            [(number, question)] = _texts(pair)
            fault = BadRowError("no_answer", "has no answer on the next line; write one or remove the line")
            yield file.unused(number, fault, question)
        else:
            (number, question), (_, answer) = _texts(pair)
            row = {"question": question, "answer": answer}
            yield from forms.rows(file, number, row, f"{question}\n{answer}")


def _pairs(file: DataFile) -> Iterator[list[Line | Unused] | Note]:
    """Lines two by two; one alone before a blank line, so that what follows is not paired wrongly."""
    pair: list[Line | Unused] = []
    for line in text_lines(file):
        if isinstance(line, Note):
            yield line
            continue
        is_blank = not isinstance(line, Unused) and not line[1].strip()
        if not is_blank:
            pair.append(line)
        if len(pair) == 2 or (pair and is_blank):
            yield pair
            pair = []
    if pair:
        yield pair


def _texts(pair: list[Line | Unused]) -> list[Line]:
    return [line for line in pair if not isinstance(line, Unused)]


def _number(line: Line | Unused) -> int:
    return line.line if isinstance(line, Unused) else line[0]
