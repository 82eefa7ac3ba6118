"""Prepared tokens on disk: flat token ids, row offsets and a supervision mask for each split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tasks.prepare.rows import SPLITS

TOKENS_FILE = "tokens.safetensors"

DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "offsets": ("I64", np.int64),
    "tokens": ("I32", np.int32),
    "supervised": ("BOOL", np.bool_),
}
"""Of each array of a split, in the order of the file: the widest first, so that all are aligned."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of one split, without padding.

    Attributes:
        tokens: (total,) int32, all rows' token ids one after another.
        offsets: (rows + 1,) int64; row i is `tokens[offsets[i]:offsets[i + 1]]`.
        supervised: (total,) bool; True where the token is to be predicted. A row's first token,
            which nothing precedes, is never supervised.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.bool_]

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> TokenRows:
        """Lay (token ids, supervision) rows end to end."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(tokens) for tokens, _ in rows], out=offsets[1:])
        tokens = np.fromiter((t for row, _ in rows for t in row), dtype=np.int32, count=int(offsets[-1]))
        mask = np.fromiter((s for _, row in rows for s in row), dtype=np.bool_, count=int(offsets[-1]))
        mask[offsets[:-1]] = False
        return cls(tokens, offsets, mask)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) tokens in each row."""
        return np.diff(self.offsets)

    @property
    def supervised_counts(self) -> NDArray[np.int64]:
        """(rows,) supervised tokens in each row."""
        before = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]  # type: ignore[no-any-return]

    def padded(self, indices: NDArray[np.int64], length: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and supervision of some rows, (rows, length) each, filled with zeros on the right."""
        tokens = np.zeros((len(indices), length), np.int32)
        supervised = np.zeros((len(indices), length), np.bool_)
        for place, index in enumerate(indices):
            ids, mask = self.row(int(index))
            tokens[place, : len(ids)] = ids
            supervised[place, : len(ids)] = mask
        return tokens, supervised

    def first(self, count: int) -> TokenRows:
        """The first `count` rows, or all when there are fewer."""
        offsets = self.offsets[: count + 1]
        return TokenRows(self.tokens[: offsets[-1]], offsets, self.supervised[: offsets[-1]])

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and supervision of one row, (length,) each."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.supervised[span]


def save_splits(folder: Path, splits: Mapping[str, TokenRows]) -> None:
    """Write `tokens.safetensors` with `<split>.tokens`, `<split>.offsets` and `<split>.supervised`."""
    lengths = {name: splits[name].lengths for name in SPLITS}
    write_tokens(folder, lengths, ([(rows.tokens, rows.supervised)] for rows in splits.values()))


def write_tokens(
    folder: Path,
    lengths: Mapping[str, NDArray[np.int64]],
    parts: Iterable[Iterable[tuple[NDArray[np.int32], NDArray[np.bool_]]]],
) -> None:
    """Write `tokens.safetensors` from parts, none of which has to be in memory with another.

    The safetensors package writes only what is in memory whole. Its format: the header's length as
    eight bytes, a JSON header padded with blanks, the arrays.

    Args:
        lengths: (rows,) tokens of each row, by split.
        parts: of each split in that order, token ids and supervision of its rows one after another.
    """
    totals = {name: int(rows.sum()) for name, rows in lengths.items()}
    header: dict[str, dict[str, object]] = {}
    place = 0
    for array, (dtype, numpy_type) in DTYPES.items():
        for name in lengths:
            count = len(lengths[name]) + 1 if array == "offsets" else totals[name]
            end = place + count * np.dtype(numpy_type).itemsize
            header[f"{name}.{array}"] = {"dtype": dtype, "shape": [count], "data_offsets": [place, end]}
            place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / TOKENS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows in lengths.values():
            file.write(np.concatenate([[0], np.cumsum(rows)]).astype(np.int64).tobytes())
        tokens_at = file.tell()
        supervised_at = tokens_at + 4 * sum(totals.values())
        for split in parts:
            for tokens, supervised in split:
                file.seek(tokens_at)
                tokens_at += file.write(tokens.astype(np.int32, copy=False).tobytes())
                file.seek(supervised_at)
                supervised_at += file.write(supervised.tobytes())


def load_splits(folder: Path) -> dict[str, TokenRows]:
    """Read what `save_splits` wrote."""
    arrays = load_file(folder / TOKENS_FILE)
    return {
        name: TokenRows(
            tokens=arrays[f"{name}.tokens"],
            offsets=arrays[f"{name}.offsets"],
            supervised=arrays[f"{name}.supervised"],
        )
        for name in SPLITS
    }
