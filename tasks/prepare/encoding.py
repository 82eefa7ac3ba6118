"""Rows to tokens, part by part: one thread renders while another tokenizes the part before.

Here a row can still turn out to be of no use: the template refuses it, it is too long, or nothing of it
would be learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress, islice

import numpy as np

from tasks.config import DataSettings
from tasks.prepare.long_rows import cut_prompts
from tasks.prepare.rows import Note, Row, Stream, Unused
from tasks.prepare.templates import TemplateError
from tasks.prepare.tokenise import ChatEncoder, Encoded, Layout

BATCH_ROWS = 1024


@dataclass(frozen=True)
class EncodedPart:
    """A part of the stream: its rows that are used, and the others.

    Attributes:
        sources: the rows as they were read.
        rows: the same rows as they are learnt.
        encoded: the same rows as tokens.
    """

    sources: list[Row]
    rows: list[Row]
    encoded: Encoded
    unused: list[Unused]
    notes: list[Note]


@dataclass
class _Candidate:
    """A row, where it stands in its part, and why it cannot be used."""

    place: int
    source: Row
    row: Row
    truncated: bool = False
    unused: Unused | None = None

    def reject(self, kind: str, detail: str) -> None:
        self.unused = Unused.of(self.source, kind, detail)


def encoded_parts(stream: Stream, encoder: ChatEncoder, data: DataSettings) -> Iterator[EncodedPart]:
    """The stream in parts, in its order, its rows encoded as the settings say."""
    with ThreadPoolExecutor(1, "tokenizer") as tokenizer:
        waiting = None
        while items := list(islice(stream, BATCH_ROWS)):
            rows = [
                _Candidate(place, item, _with_system(item, data.system_prompt))
                for place, item in enumerate(items)
                if isinstance(item, Row)
            ]
            layout = _lay_out(rows, encoder, data.supervise)
            encoding = tokenizer.submit(encoder.encode, layout)
            if waiting:
                yield _finish(waiting[0], waiting[1], waiting[2].result(), encoder, data)
            waiting = items, rows, encoding
        if waiting:
            yield _finish(waiting[0], waiting[1], waiting[2].result(), encoder, data)


def _lay_out(rows: Sequence[_Candidate], encoder: ChatEncoder, supervise: str) -> Layout:
    """All rows at once; row by row only when the template refuses one, to tell which."""
    try:
        return encoder.lay_out([one.row for one in rows], supervise)
    except TemplateError:
        for one in rows:
            try:
                encoder.lay_out([one.row], supervise)
            except TemplateError as error:
                one.reject("template", str(error))
        return encoder.lay_out([one.row for one in rows if one.unused is None], supervise)


def _finish(
    items: Sequence[Row | Unused | Note],
    candidates: Sequence[_Candidate],
    encoded: Encoded,
    encoder: ChatEncoder,
    data: DataSettings,
) -> EncodedPart:
    rows = [one for one in candidates if one.unused is None]
    notes = [item for item in items if isinstance(item, Note)]
    if rows:
        _check_lengths(rows, encoded, encoder, data)
    notes += [note for one in rows if one.unused is None for note in _notes(one, encoder)]
    keep = np.array([one.unused is None for one in rows], np.bool_)
    rows = [*compress(rows, keep)]
    if any(one.truncated for one in rows):
        encoded = encoder.encode(encoder.lay_out([one.row for one in rows], data.supervise))
    elif not keep.all():
        encoded = encoded.only(keep)
    unused = [(place, item) for place, item in enumerate(items) if isinstance(item, Unused)]
    unused += [(one.place, one.unused) for one in candidates if one.unused is not None]
    unused.sort(key=lambda pair: pair[0])
    sources = [one.source for one in rows]
    return EncodedPart(sources, [one.row for one in rows], encoded, [one for _, one in unused], notes)


def _check_lengths(
    rows: Sequence[_Candidate], encoded: Encoded, encoder: ChatEncoder, data: DataSettings
) -> None:
    """Reject rows that are too long or teach nothing; replace those whose prompts may be cut."""
    learnt, limit = encoded.supervised_counts, data.max_seq_length
    for index in np.flatnonzero((encoded.lengths > limit) | (learnt == 0)).tolist():
        one, length = rows[index], int(encoded.lengths[index])
        if learnt[index] == 0:
            one.reject("nothing_supervised", f"{length} tokens, none of which would be learnt; remove it")
        elif data.on_long_row == "truncate-prompt" and (cut := cut_prompts(one.row, encoder, limit)):
            one.row, one.truncated = cut, True
        else:
            why = "; its answers leave no room" if data.on_long_row == "truncate-prompt" else ""
            one.reject("too_long", f"{length} tokens; data.max_seq_length is {limit}{why}")


def _notes(one: _Candidate, encoder: ChatEncoder) -> Iterator[Note]:
    source, row = one.source, one.row
    texts = [row.text, *(turn["content"] for turn in row.messages)]
    if any(map(encoder.template.holds_control, texts)):
        yield Note(source.file, source.line, "control_text")
    if row.tools and not encoder.template.skeleton(row.messages, row.tools).writes_tools:
        yield Note(source.file, source.line, "tools_unwritten")
    if one.truncated:
        yield Note(source.file, source.line, "truncated")


def _with_system(row: Row, system_prompt: str | None) -> Row:
    if system_prompt is None or not row.messages or any(t["role"] == "system" for t in row.messages):
        return row
    return replace(row, messages=[{"role": "system", "content": system_prompt}, *row.messages])
