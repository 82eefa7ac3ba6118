"""What a source is read into: rows, rows that cannot be used, and harmless oddities, each with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Turn = dict[str, Any]
Messages = list[Turn]
"""Turns as chat templates take them: `role`, `content`; for tools `tool_calls`, `tool_call_id`, `name`."""

ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Row:
    """One conversation, or one text that is learnt whole.

    Attributes:
        line: its first line in its file, from 1; in a Parquet file or hub dataset, its number.
        format: the form it was written in, a key of `formats.FORMATS`.
        messages: its turns; empty for a text.
        text: the text of a row of format "text", else empty.
        tools: the tools its turns may call, as the chat template takes them.
        file: the name of its file where the source has several.
        split: the split its source puts it in, one of `SPLITS`, or None.
    """

    line: int
    format: str
    messages: Messages
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    file: str = ""
    split: str | None = None

    @cached_property
    def identity(self) -> str:
        """SHA-256 of what is learnt, each run of white space taken as one blank: equal for duplicates."""
        turns: list[Any] = [[turn["role"], " ".join(turn["content"].split())] for turn in self.messages]
        more = [turn["tool_calls"] for turn in self.messages if "tool_calls" in turn]
        if self.text or self.tools or more:
            turns.append([" ".join(self.text.split()), self.tools, more])
        return hashlib.sha256(json.dumps(turns).encode()).hexdigest()

    def written(self) -> str:
        """The row as a person reads it, for lists of rows."""
        return self.text or "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)


@dataclass(frozen=True)
class Unused:
    """A row that was read and is not used.

    Attributes:
        kind: a key of `REASONS`.
        detail: what is wrong with this one, and where it helps what to do.
        text: the row; of a long one the beginning.
    """

    file: str
    line: int
    kind: str
    detail: str
    text: str

    @classmethod
    def of(cls, row: Row, kind: str, detail: str) -> Unused:
        """A row that was read whole."""
        return cls(row.file, row.line, kind, detail, row.written())


@dataclass(frozen=True)
class Note:
    """An oddity that harms nothing, and is said in the report.

    Attributes:
        kind: a key of `NOTES`.
        detail: what tells several of a kind apart, as a column's name.
    """

    file: str
    line: int
    kind: str
    detail: str = ""


Stream = Iterator[Row | Unused | Note]
"""A source in its order; each stage of the preparation takes rows out of it and passes on the rest."""

FAULTS = {
    "encoding": "not UTF-8",
    "surrogate": "half of a character",
    "nul": "a NUL character",
    "json": "broken JSON",
    "quotes": "a quote out of place",
    "columns": "more or fewer cells than the header",
    "too_large": "too large for a row",
    "duplicate_key": "a key twice",
    "not_a_number": "NaN or infinity",
    "huge_number": "an integer too long to be read",
    "nested": "nested too deeply",
    "format": "no known form",
    "type": "a value of the wrong type",
    "role": "a missing or unknown role",
    "empty": "an empty text",
    "no_user_turn": "nobody asks",
    "no_answer": "nobody answers",
    "template": "refused by the chat template",
}
"""Rows that are wrong: `data.on_bad_row` says whether they end the preparation."""

REASONS = {
    **FAULTS,
    "characters": "outside data.min_chars and data.max_chars",
    "too_long": "over data.max_seq_length",
    "nothing_supervised": "nothing of it would be learnt",
    "duplicate": "the same as another row",
    "near_duplicate": "nearly the same as another row",
    "leaked": "also in the validation or test rows",
    "not_chosen": "over data.max_rows",
}
"""Every reason for which a row may be unused."""

DUPLICATES = ("duplicate", "near_duplicate", "leaked")

NOTES = {
    "bom": "a byte order mark, taken off",
    "crlf": "line ends of Windows, taken off",
    "blank_line": "blank lines, passed over",
    "column": "a column that is not learnt",
    "two_forms": "several forms in one row; the first known one is taken",
    "control_text": "control tokens written out in the text, learnt as plain text",
    "tools_unwritten": "tools that the chat template does not write",
    "truncated": "prompts cut to fit data.max_seq_length",
    "file": "files of the folder that are not read",
}
"""Every oddity that may be noted."""


def hash_share(identity: str, seed: int, purpose: str) -> float:
    """A number in [0, 1), uniform over rows, that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{identity}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
