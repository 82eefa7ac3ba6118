"""Rows on their way to the disk: written as they come, dealt out to the splits when all are there.

Nothing that grows with a row's length stays in memory, only some fifty bytes a row.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.prepare.chats import as_answer, json_line, written_row
from tasks.prepare.rows import SPLITS, Row, hash_share
from tasks.prepare.splits import write_tokens
from tasks.prepare.tokenise import Encoded

DEAL_TOKENS = 1 << 24  # read back at a time: 80 MB


@dataclass(frozen=True)
class Dealt:
    """What the report says of the rows, by their order in the source.

    Attributes:
        splits: (rows,) index into `SPLITS`.
        lengths: (rows,) tokens.
        supervised: (rows,) supervised tokens.
        prompts: (rows,) a hash of all that stands before the last answer.
        places: (file, line) of the first training rows.
    """

    splits: NDArray[np.int8]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    prompts: NDArray[np.uint64]
    places: list[tuple[str, int]]


class Spool:
    """Takes encoded rows in their order and deals them out to the files of the splits."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._paths = {name: folder / f".{name}" for name in ("rows", "tokens", "supervised")}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self._lengths, self._supervised, self._lines = array("q"), array("q"), array("q")
        self._shares, self._given, self._texts = array("d"), array("b"), array("b")
        self._prompts, self._file_of = array("Q"), array("l")
        self._names: dict[str, int] = {}

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, path in self._paths.items():
            self._files[name].close()
            path.unlink(missing_ok=True)

    @property
    def shares(self) -> NDArray[np.float64]:
        """(rows,) each row's hash in [0, 1)."""
        return np.array(self._shares, np.float64)

    @property
    def given(self) -> NDArray[np.int8]:
        """(rows,) the split each row's source puts it in, as an index into `SPLITS`, or -1."""
        return np.array(self._given, np.int8)

    def add(self, sources: Sequence[Row], learnt: Sequence[Row], encoded: Encoded) -> None:
        """Take rows as they were read, as they are learnt, and as tokens."""
        for source, row in zip(sources, learnt, strict=True):
            self._shares.append(hash_share(source.identity, self._seed, "split"))
            self._given.append(-1 if source.split is None else SPLITS.index(source.split))
            self._lines.append(source.line)
            self._file_of.append(self._names.setdefault(source.file, len(self._names)))
            self._texts.append(not row.messages)
            self._prompts.append(_prompt_hash(row))
        if not sources:
            return
        self._files["rows"].write("".join([json_line(written_row(row)) for row in learnt]).encode())
        self._files["tokens"].write(encoded.tokens.tobytes())
        self._files["supervised"].write(encoded.supervised.tobytes())
        self._lengths.extend(encoded.lengths.tolist())
        self._supervised.extend(encoded.supervised_counts.tolist())

    def deal(self, splits: NDArray[np.int8], samples: int) -> Dealt:
        """Write the splits' rows and tokens; say what they are."""
        for file in self._files.values():
            file.close()
        lengths = np.array(self._lengths, np.int64)
        self._deal_rows(splits)
        by_split = {name: lengths[splits == index] for index, name in enumerate(SPLITS)}
        write_tokens(self._folder, by_split, (self._tokens(splits == i, lengths) for i in range(len(SPLITS))))
        names = list(self._names)
        first = np.flatnonzero(splits == 0)[:samples]
        return Dealt(
            splits,
            lengths,
            np.array(self._supervised, np.int64),
            np.array(self._prompts, np.uint64),
            [(names[self._file_of[i]], self._lines[i]) for i in first],
        )

    def _deal_rows(self, splits: NDArray[np.int8]) -> None:
        mixed = 0 < sum(self._texts) < len(self._texts)
        targets = [(self._folder / f"{name}.jsonl").open("wb") for name in SPLITS]
        try:
            with self._paths["rows"].open("rb") as lines:
                for line, split, is_text in zip(lines, splits.tolist(), self._texts, strict=True):
                    targets[split].write(_with_messages(line) if mixed and is_text else line)
        finally:
            for target in targets:
                target.close()

    def _tokens(
        self, mine: NDArray[np.bool_], lengths: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """The tokens of the rows that are mine, some rows at a time."""
        ends = np.cumsum(lengths)
        start = 0
        with self._paths["tokens"].open("rb") as tokens, self._paths["supervised"].open("rb") as supervised:
            while start < len(lengths):
                read = int(ends[start - 1]) if start else 0
                stop = max(int(np.searchsorted(ends, read + DEAL_TOKENS)), start + 1)
                count = int(ends[stop - 1]) - read
                keep = np.repeat(mine[start:stop], lengths[start:stop])
                some = np.fromfile(tokens, np.int32, count), np.fromfile(supervised, np.bool_, count)
                yield some[0][keep], some[1][keep]
                start = stop


def _prompt_hash(row: Row) -> int:
    """Of all turns before the last answer, each run of white space taken as one blank; of a text, of all."""
    answers = [place for place, turn in enumerate(row.messages) if turn["role"] == "assistant"]
    asked = row.messages[: answers[-1]] if answers else []
    text = "\0".join([" ".join(turn["content"].split()) for turn in asked]) or row.identity
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _with_messages(line: bytes) -> bytes:
    written: dict[str, Any] = json.loads(line)
    return json_line({**written, "messages": as_answer(written["text"])}).encode()


def first_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a split that was dealt out."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in islice(lines, count)]
