"""Where every row that was read has gone: counts, first examples, and `rejected.jsonl`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tasks.config import DataSettings
from tasks.errors import InputError
from tasks.prepare.chats import json_line
from tasks.prepare.files import LONGEST_TEXT
from tasks.prepare.rows import DUPLICATES, FAULTS, NOTES, REASONS, Note, Row, Stream, Unused

EXAMPLES, NOTES_KEPT = 5, 20
REFUSED_SHOWN = 10
REJECTED_FILE = "rejected.jsonl"


@dataclass
class Account:
    """Counts what becomes of the rows, and writes down each that is not used.

    Attributes:
        read: rows that left the source, whatever became of them.
        used: rows that are trained on or held out.
        refused: of the rows that end the preparation, as the settings say, the first; all counted in
            `refusals`.
    """

    data: DataSettings
    folder: Path
    read: int = 0
    used: int = 0
    refusals: int = 0
    refused: list[Unused] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Unused | Note]] = field(default_factory=lambda: defaultdict(list))

    def __enter__(self) -> Account:
        self._rejected = (self.folder / REJECTED_FILE).open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rejected.close()

    def counting(self, stream: Stream) -> Stream:
        """The stream as it leaves the source; after a refusal, without its rows: only faults are sought."""
        for item in stream:
            self.read += not isinstance(item, Note)
            if not (self.refused and isinstance(item, Row)):
                yield item

    def put(self, unused: Sequence[Unused], notes: Sequence[Note], used: Sequence[Row]) -> None:
        """Book a part of the stream."""
        for one in unused:
            self._book(one)
        for note in notes:
            self.notes[note.kind] += 1
            self._keep(note.kind, note, NOTES_KEPT)
        self.used += len(used)
        self.formats.update(row.format for row in used)

    def close(self, source: str) -> None:
        """End the accounts.

        Raises:
            InputError: rows were refused.
            AssertionError: a row was lost or counted twice; a defect of this program.
        """
        if self.refused:
            raise InputError(self._refusal(source))
        unused = sum(self.reasons.values())
        if self.read != self.used + unused:
            raise AssertionError(f"{self.read} rows read, but {self.used} used and {unused} not")

    def figures(self) -> dict[str, Any]:
        """The counts for the report: `rows_read` = `rows_used` + `duplicates` + `rejected`."""
        duplicates = sum(self.reasons[kind] for kind in DUPLICATES)
        return {
            "rows_read": self.read,
            "rows_used": self.used,
            "duplicates": duplicates,
            "rejected": sum(self.reasons.values()) - duplicates,
            "reasons": {
                kind: {"rows": count, "meaning": REASONS[kind], "first": self._first(kind)}
                for kind, count in self.reasons.most_common()
            },
            "notes": {
                kind: {"count": count, "meaning": NOTES[kind], "first": self._first(kind)}
                for kind, count in self.notes.most_common()
            },
            "formats": dict(self.formats.most_common()),
        }

    def _book(self, one: Unused) -> None:
        self.reasons[one.kind] += 1
        self._keep(one.kind, one, EXAMPLES)
        written = {"line": one.line, "reason": f"{one.kind}: {one.detail}", "text": one.text}
        self._rejected.write(json_line({"file": one.file, **written} if one.file else written))
        ends = one.kind in FAULTS and self.data.on_bad_row == "fail"
        if ends or (one.kind == "too_long" and self.data.on_long_row == "error"):
            self.refusals += 1
            if len(self.refused) < REFUSED_SHOWN:
                self.refused.append(one)

    def _keep(self, kind: str, one: Unused | Note, most: int) -> None:
        if len(self.examples[kind]) < most:
            self.examples[kind].append(one)

    def _first(self, kind: str) -> list[dict[str, Any]]:
        shown = []
        for one in self.examples[kind]:
            example = {"file": one.file, "line": one.line, "detail": one.detail}
            if isinstance(one, Unused):
                example["text"] = one.text[:LONGEST_TEXT]
            shown.append(example)
        return shown

    def _refusal(self, source: str) -> str:
        lines = []
        for one in self.refused:
            place = f"{source}/{one.file}" if one.file else source
            lines.append(f"{place}, line {one.line}: {one.detail}")
        if more := self.refusals - len(self.refused):
            lines.append(f"{source}: and {more} more bad row{'s' * (more > 1)}")
        long = self.reasons["too_long"] if self.data.on_long_row == "error" else 0
        settings = ["data.on_bad_row=skip"] * (self.refusals > long) + ["data.on_long_row=drop"] * (long > 0)
        rest = self.read - self.refusals
        lines.append(f"mend them, or go on with the other {rest:,} rows: {' '.join(settings)}")
        return "\n".join(lines)
