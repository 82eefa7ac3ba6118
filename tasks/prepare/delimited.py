"""Rows of a CSV or TSV file: a header, then cells, some of them quoted over several lines."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tasks.errors import InputError
from tasks.prepare.faults import BadRowError, listed
from tasks.prepare.files import DataFile
from tasks.prepare.formats import Forms
from tasks.prepare.lines import BOM, LONGEST_ROW_BYTES, LongLine, long_line, not_utf8, numbered_lines
from tasks.prepare.rows import Note, Stream, Unused

DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
EXCEL_DELIMITER = re.compile(r"sep=([,;\t])[\r\n]*")  # a first line that only Excel writes and reads
QUOTED = re.compile('"[^"]*"')


class Record(NamedTuple):
    """A line of the table: where it starts, as it is written, and its cells or what is wrong with them.

    Bytes that are not UTF-8 are lone surrogates in `text`.
    """

    line: int
    text: str
    cells: list[str] | BadRowError


def read_delimited(file: DataFile, forms: Forms) -> Stream:
    """The rows of a UTF-8 file in their order; an empty cell is a missing value.

    A CSV file may be separated by `;` or tabs too, which its header shows. Blank lines, and lines of
    nothing but empty cells, are passed over.

    Raises:
        InputError: the file cannot be read to its end, a quoted cell never ends, or the header is missing
            or unfit.
    """
    header: list[str] = []
    places: list[tuple[str, int]] = []
    for record in _records(file):
        if not isinstance(record, Record):
            yield record
        elif not header:
            header = _header(file, record)
            try:
                columns, notes = forms.table_columns(file, record.line, header)
            except BadRowError as fault:
                raise _error(
                    file, record.line, f"the first line has to name the columns; it {fault}"
                ) from None
            places = [(column, header.index(column)) for column in columns]
            yield from notes
        elif isinstance(row := _row(record, header, places), BadRowError):
            yield file.unused(record.line, row, record.text)
        else:
            yield from forms.rows(file, record.line, row, record.text)
    if not header:
        raise InputError(f"{file.path}: has no header; write the columns' names on the first line")


def _header(file: DataFile, record: Record) -> list[str]:
    fault = not_utf8(record.text) or record.cells
    if isinstance(fault, BadRowError):
        raise _error(file, record.line, f"the header {fault}")
    header = [cell.strip() for cell in fault]
    if twice := [name for name, count in Counter(header).items() if count > 1 and name]:
        raise _error(file, record.line, f"the header has {listed(twice)} twice; rename or remove one")
    if "" in header:
        unnamed = f"the header has no name for column {header.index('') + 1}; name it or remove the column"
        raise _error(file, record.line, f"{unnamed} (pandas writes one unless to_csv is given index=False)")
    return header


def _row(
    record: Record, header: list[str], places: list[tuple[str, int]]
) -> dict[str, str | None] | BadRowError:
    if fault := not_utf8(record.text):
        return fault
    cells = record.cells
    if isinstance(cells, BadRowError):
        return cells
    if len(cells) != len(header):
        counts = f"has {len(cells)} cells where the header has {len(header)}"
        return BadRowError("columns", f"{counts}; put quotes around cells that hold a delimiter")
    return {column: cells[place] or None for column, place in places}


def _records(file: DataFile) -> Iterator[Record | Unused | Note]:
    lines = _Lines(file)
    csv.field_size_limit(LONGEST_ROW_BYTES)  # one limit for the whole process; as installed 128 KiB
    table = csv.reader(lines, delimiter=lines.delimiter, strict=True)
    is_crlf_noted = False
    while True:
        lines.begin()
        cells: list[str] | BadRowError
        try:
            cells = next(table)
        except StopIteration:
            yield from lines.take_odd()
            return
        except csv.Error as error:
            cells = lines.fault(error)
        yield from lines.take_odd()
        if lines.ends_crlf and not is_crlf_noted:
            is_crlf_noted = True
            yield file.note(lines.number, "crlf")
        if isinstance(cells, BadRowError) or any(cells):
            yield Record(lines.first, lines.text, cells)
        else:
            yield file.note(lines.first, "blank_line")


class _Lines:
    """Iterates over a file's lines for `csv.reader`, and remembers those of the record it is reading.

    Attributes:
        delimiter: what separates cells.
        first: the line the record begins on.
        number: the line given last.
        ends_crlf: whether that one ended in CRLF.
    """

    def __init__(self, file: DataFile) -> None:
        self.first = self.number = 0
        self.ends_crlf = False
        self._file = file
        self._lines = numbered_lines(file)
        self._odd: list[Note | Unused] = []
        self._is_windows = False
        self._again = ""
        self.begin()
        self.delimiter = self._find_delimiter()

    def begin(self) -> None:
        """A new record begins."""
        self._record: list[str] = []
        self._size_bytes = 0

    @property
    def text(self) -> str:
        """The record as written."""
        return "".join(self._record)

    def take_odd(self) -> list[Note | Unused]:
        """What was met on the way to the record."""
        odd, self._odd = self._odd, []
        return odd

    def fault(self, error: csv.Error) -> BadRowError:
        """The fault of a record whose quotes are wrong.

        Raises:
            InputError: it goes over several lines, so that where it ends cannot be told.
        """
        if len(self._record) > 1 or "unexpected end" in str(error):
            raise _error(self._file, self.first, f"{error}; {ENDLESS}")
        cure = 'write "" for a quote within quotes, and put quotes around line breaks'
        return BadRowError("quotes", f"cannot be cut into cells: {error}; {cure}")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            text, self._again = self._again, ""
        else:
            text = self._next_line()
        if not self._record:
            self.first = self.number
        self._record.append(text)
        return text

    def _find_delimiter(self) -> str:
        while (beginning := next(self, "")) and not beginning.strip():
            self._odd.append(self._file.note(self.number, "blank_line"))
        # Where the first line ends as Windows does, so do the lines within cells.
        self._is_windows = self.ends_crlf
        if excel := EXCEL_DELIMITER.fullmatch(beginning):
            return excel[1]
        self._again = beginning
        unquoted = QUOTED.sub("", beginning)
        return max(DELIMITERS[self._file.suffix], key=unquoted.count)

    def _next_line(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, LongLine):
            if self._record or line.quotes % 2:
                raise _error(self._file, self.number, f"a line over 32 MiB; {ENDLESS}")
            self._odd.append(long_line(self._file, self.number, line))
            return self._next_line()
        if line.startswith(BOM) and not self._record:
            self._odd.append(self._file.note(self.number, "bom"))
            line = line[len(BOM) :]
        self._size_bytes += len(line)
        if self._size_bytes > LONGEST_ROW_BYTES:
            raise _error(self._file, self.first, f"a row over 32 MiB; {ENDLESS}")
        self.ends_crlf = line.endswith(b"\r\n")
        if self.ends_crlf and self._is_windows:
            line = line[:-2] + b"\n"
        return line.decode("utf-8", "surrogateescape")


def _error(file: DataFile, line: int, detail: str) -> InputError:
    return InputError(f"{file.path}, line {line}: {detail}")


ENDLESS = "a quoted cell may begin here that never ends, so what follows cannot be told apart: mend the file"
