"""Rows of a JSONL file: one JSON object a line."""

from __future__ import annotations

from tasks.prepare.faults import BadRowError
from tasks.prepare.files import DataFile
from tasks.prepare.formats import Forms
from tasks.prepare.lines import text_lines
from tasks.prepare.rows import Stream
from tasks.prepare.strict_json import StrictJson


def read_jsonl(file: DataFile, forms: Forms) -> Stream:
    """The rows of a UTF-8 file in their order; byte order marks, CRLF and blank lines are taken.

    Raises:
        InputError: the file cannot be read to its end.
    """
    json_text = StrictJson()
    for line in text_lines(file):
        if not isinstance(line, tuple):
            yield line
            continue
        number, text = line
        if not text or text.isspace():
            yield file.note(number, "blank_line")
            continue
        try:
            value = json_text.parse(text)
        except BadRowError as fault:
            yield file.unused(number, fault, text)
        else:
            yield from forms.rows(file, number, value, text)
