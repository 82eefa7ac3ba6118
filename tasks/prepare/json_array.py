"""Rows of a .json file: one array, parsed an element at a time; or JSON lines under another name."""

from __future__ import annotations

import codecs
import io
import json
import re
from typing import Any

from tasks.errors import InputError
from tasks.prepare.faults import BadRowError
from tasks.prepare.files import LONGEST_TEXT, DataFile
from tasks.prepare.formats import Forms
from tasks.prepare.jsonl import read_jsonl
from tasks.prepare.lines import BOM, LONGEST_ROW_BYTES, not_utf8, too_large
from tasks.prepare.opening import READ_ERRORS, open_text, unreadable
from tasks.prepare.rows import Stream
from tasks.prepare.strict_json import StrictJson, too_deep

CHUNK_BYTES = 1 << 16
LONGEST_TOKEN = len(r"\ud83d\ude00")  # that the end of the window may have cut in two

BLANK = re.compile(r"[ \t\r\n]*")
IN_STRING = re.compile(r'"|\\.', re.DOTALL)
OUT_OF_STRING = re.compile(r'["\[\]{},]')


def read_json(file: DataFile, forms: Forms) -> Stream:
    """The rows of an array, or of lines where the file's first character does not begin one.

    Raises:
        InputError: the file cannot be read to its end, or is broken so that what follows cannot be told
            apart.
    """
    beginning = _first_line(file)
    if beginning.startswith(b"["):
        yield from _read_array(file, forms)
    elif beginning == b"{":
        cure = "write the rows as one array [{…}, {…}], or one {…} a line"
        raise InputError(f"{file.path}: is one JSON object over several lines; {cure}")
    else:
        yield from read_jsonl(file, forms)


def _first_line(file: DataFile) -> bytes:
    """The first line that is not blank, or its beginning, without outer blanks."""
    with open_text(file) as stream:
        try:
            line = stream.readline(CHUNK_BYTES).removeprefix(BOM)
            while line and not line.strip():
                line = stream.readline(CHUNK_BYTES)
        except READ_ERRORS as error:
            raise unreadable(file, error, "") from None
    return line.strip()


def _read_array(file: DataFile, forms: Forms) -> Stream:
    with open_text(file) as stream:
        window = _Window(file, stream)
        if window.peek() == "\ufeff":
            yield file.note(1, "bom")
            window.advance(1)
        window.expect("[")
        json_text = StrictJson()
        while window.peek() != "]":
            yield from _read_element(file, forms, window, json_text)
            if window.peek() == "]":
                break
            window.expect(",")
            if window.peek() == "]":
                raise window.error("a comma stands before the array's end; remove it")
        window.expect("]")
        if (beyond := window.peek()) != "":
            raise window.error(f"'{beyond}' follows the array's end; make one array of all rows")
        if window.crlf_line is not None:
            yield file.note(window.crlf_line, "crlf")


def _read_element(file: DataFile, forms: Forms, window: _Window, json_text: StrictJson) -> Stream:
    line = window.line
    try:
        value, text = window.parse(json_text)
        fault = not_utf8(text) or json_text.fault_of(value, text)
    except BadRowError as unending:
        value, text, fault = None, window.pass_over(), unending
    if fault is not None:
        yield file.unused(line, fault, text)
    else:
        yield from forms.rows(file, line, value, text)


class _Window:
    """What is held of an array's text: from the place reached, as far as an element needs.

    Attributes:
        line: the line of the place reached.
        crlf_line: the first line that was seen to end in CRLF.
    """

    def __init__(self, file: DataFile, stream: io.BufferedReader[Any]) -> None:
        self._file = file
        self._stream = stream
        # Bytes that are not UTF-8 become lone surrogates, so that the row they stand in can be told.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._place = 0
        self._is_whole = False
        self.line = 1
        self.crlf_line: int | None = None

    def peek(self) -> str:
        """The next character that is no blank, at which the window then stands; empty at the end."""
        while True:
            match = BLANK.match(self._text, self._place)
            end = match.end() if match else self._place
            if end < len(self._text) or self._is_whole:
                self.advance(end - self._place)
                return self._text[end : end + 1]
            is_cut = end > self._place and self._text.endswith("\r")  # it may be half of a CRLF
            self.advance(end - self._place - is_cut)
            self._more()

    def expect(self, mark: str) -> None:
        """Move over a punctuation mark."""
        if (found := self.peek()) != mark:
            told = f"'{found}'" if found else "the end of the file"
            raise self.error(f"{told} stands where the array needs '{mark}'; mend the file there")
        self.advance(1)

    def parse(self, json_text: StrictJson) -> tuple[Any, str]:
        """The value at which the window stands, and its text; the window then stands behind it.

        Raises:
            BadRowError: it is too long, or nested too deeply, for its end to be found by parsing.
            InputError: it is broken, so that where it ends cannot be told.
        """
        while True:
            try:
                value, end = json_text.parse_at(self._text, self._place)
            except RecursionError:
                raise too_deep() from None
            except json.JSONDecodeError as error:
                if not self._may_go_on(error):
                    raise self._broken(error) from None
                if len(self._text) - self._place > LONGEST_ROW_BYTES:
                    raise too_large() from None
                if not self._more():
                    raise self._broken(error) from None
                continue
            if end == len(self._text) and self._more():  # the digits of a number may go on
                continue
            if end - self._place > LONGEST_ROW_BYTES:
                raise too_large()
            text = self._text[self._place : end]
            self.advance(len(text))
            return value, text

    def pass_over(self) -> str:
        """Move behind an element that cannot be parsed, by its brackets alone; gives its beginning."""
        beginning = self._text[self._place : self._place + LONGEST_TEXT]
        first_line = self.line
        depth, in_string = 0, False
        while True:
            match = (IN_STRING if in_string else OUT_OF_STRING).search(self._text, self._place)
            if match is None:
                is_cut = self._text.endswith("\\", self._place)  # of an escape that goes on in the next chunk
                self.advance(len(self._text) - self._place - is_cut)
                if not self._more():
                    raise InputError(f"{self._file.path}, line {first_line}: {NEVER_ENDS}")
                continue
            mark = match[0]
            if depth == 0 and not in_string and mark in ",]}":
                return beginning
            self.advance(match.end() - self._place)
            in_string = in_string != (mark == '"')
            if not in_string:
                depth += (mark in "[{") - (mark in "]}")
            if depth == 0 and not in_string:
                return beginning

    def advance(self, characters: int) -> None:
        """Move on within what is held."""
        end = self._place + characters
        if self.crlf_line is None and (found := self._text.find("\r\n", self._place, end)) >= 0:
            self.crlf_line = self.line + self._text.count("\n", self._place, found)
        self.line += self._text.count("\n", self._place, end)
        self._place = end

    def error(self, detail: str) -> InputError:
        """What to raise when the array is broken at the place reached."""
        return InputError(f"{self._file.path}, line {self.line}: {detail}")

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        is_open = error.msg.startswith("Unterminated string")
        return is_open or error.pos >= len(self._text) - LONGEST_TOKEN

    def _broken(self, error: json.JSONDecodeError) -> InputError:
        if error.msg.startswith("Unterminated string") or not self._text[error.pos :].strip():
            return self.error(NEVER_ENDS)
        is_nul = "\0" in self._text[self._place : error.pos + 1]
        self.advance(error.pos - self._place)
        return self.error(
            "holds NUL bytes; mend the file there" if is_nul else f"{error.msg.removesuffix(' at')}; {MEND}"
        )

    def _more(self) -> bool:
        """Read on; False when the file has ended."""
        held = len(self._text) - self._place
        try:
            data = self._stream.read1(max(CHUNK_BYTES, min(held, LONGEST_ROW_BYTES - held)))
            self._is_whole = not data
            self._text = self._text[self._place :] + self._decode(data, self._is_whole)
        except READ_ERRORS as error:
            raise unreadable(self._file, error, f", after line {self.line}") from None
        self._place = 0
        return not self._is_whole


MEND = "this is not JSON, and what follows cannot be told apart: mend the file there"
NEVER_ENDS = "the row that begins here has no end; close its quotes and brackets"
