"""Prepared tokens on disk: flat token ids, row offsets and a supervision mask for each split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

SPLITS = ("train", "valid", "test")
TOKENS_FILE = "tokens.safetensors"


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

    def most_supervised(self) -> int:
        """Supervised tokens in the row that has most of them."""
        return int(np.add.reduceat(self.supervised, self.offsets[:-1], dtype=np.int64).max())

    def first(self, count: int) -> TokenRows:
        """The first `count` rows, or all when there are fewer."""
        offsets = self.offsets[: count + 1]
        return TokenRows(self.tokens[: offsets[-1]], offsets, self.supervised[: offsets[-1]])

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and supervision of one row, (length,) each."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.supervised[span]


def save_splits(folder: Path, splits: dict[str, TokenRows]) -> None:
    """Write `tokens.safetensors` with `<split>.tokens`, `<split>.offsets` and `<split>.supervised`."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, rows in splits.items():
        arrays[f"{name}.tokens"] = rows.tokens
        arrays[f"{name}.offsets"] = rows.offsets
        arrays[f"{name}.supervised"] = rows.supervised
    save_file(arrays, folder / TOKENS_FILE)


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
