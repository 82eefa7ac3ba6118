"""The lines of a text file with their numbers, never holding one that is too long for a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from tasks.prepare.faults import BadRowError
from tasks.prepare.files import LONGEST_TEXT, DataFile
from tasks.prepare.opening import READ_ERRORS, open_text, unreadable
from tasks.prepare.rows import Note, Unused

LONGEST_ROW_BYTES = 32 << 20
PIECE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"

Line = tuple[int, str]


@dataclass(frozen=True)
class LongLine:
    """What is kept of a line over `LONGEST_ROW_BYTES`: its beginning, and how many `"` it holds."""

    beginning: bytes
    quotes: int


def text_lines(file: DataFile) -> Iterator[Line | Unused | Note]:
    """(number, text) of each line without its end, and what is wrong or odd about others.

    Raises:
        InputError: the file cannot be read to its end.
    """
    is_crlf_noted = False
    for number, line in numbered_lines(file):
        if isinstance(line, LongLine):
            yield long_line(file, number, line)
            continue
        if line.startswith(BOM):
            yield file.note(number, "bom")
            line = line[len(BOM) :]
        if not is_crlf_noted and line.endswith(b"\r\n"):
            yield file.note(number, "crlf")
            is_crlf_noted = True
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            fault = BadRowError("encoding", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
            yield file.unused(number, fault, line.decode("utf-8", "replace").rstrip("\r\n"))


def numbered_lines(file: DataFile) -> Iterator[tuple[int, bytes | LongLine]]:
    """Each line's number, from 1, and its bytes with its end.

    Raises:
        InputError: the file cannot be read to its end.
    """
    number = 0
    with open_text(file) as stream:
        try:
            while line := _read_line(stream):
                number += 1
                yield number, line
        except READ_ERRORS as error:
            raise unreadable(file, error, f", after line {number}") from None


def long_line(file: DataFile, number: int, line: LongLine) -> Unused:
    """The row that such a line would have been."""
    return file.unused(number, too_large(), line.beginning.decode("utf-8", "replace"))


def too_large() -> BadRowError:
    """The fault of a row over `LONGEST_ROW_BYTES`."""
    return BadRowError("too_large", f"over {LONGEST_ROW_BYTES >> 20} MiB; cut it into several rows")


def not_utf8(text: str) -> BadRowError | None:
    """The fault of a text decoded with "surrogateescape" from bytes that are not all UTF-8."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRowError("encoding", "holds bytes that are not UTF-8; save the file as UTF-8")
    return None


def _read_line(stream: IO[bytes]) -> bytes | LongLine:
    piece = stream.readline(PIECE_BYTES)
    if len(piece) < PIECE_BYTES or piece.endswith(b"\n"):
        return piece
    pieces = [piece]
    length_bytes, quotes = len(piece), piece.count(b'"')
    while not piece.endswith(b"\n") and (piece := stream.readline(PIECE_BYTES)):
        length_bytes += len(piece)
        quotes += piece.count(b'"')
        if length_bytes <= LONGEST_ROW_BYTES:
            pieces.append(piece)
        else:
            pieces = [pieces[0][: 4 * LONGEST_TEXT]]  # a character has up to four bytes
    return b"".join(pieces) if length_bytes <= LONGEST_ROW_BYTES else LongLine(pieces[0], quotes)
