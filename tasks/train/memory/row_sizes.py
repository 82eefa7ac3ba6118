"""What memory depends on of the rows: how long they are, and how much of them is supervised."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.prepare.splits import TokenRows
from tasks.train.batches import COUNT_BUCKETS, LENGTH_BUCKETS, bucket

ROWS = 64
"""Of rows that are only imagined: enough for any batch."""


@dataclass(frozen=True)
class RowSizes:
    """The sizes of some rows.

    Attributes:
        lengths: (rows,) tokens of each.
        supervised: (rows,) supervised tokens of each.
    """

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]

    @classmethod
    def alike(cls, length: int, supervised: int, rows: int = ROWS) -> RowSizes:
        """Rows of one size."""
        return cls(np.full(rows, length), np.full(rows, supervised))

    @classmethod
    def of(cls, rows: TokenRows) -> RowSizes:
        """Those of prepared rows."""
        return cls(rows.lengths, rows.supervised_counts)

    def longer(self, tokens: int) -> RowSizes:
        """The same with `tokens` unsupervised ones in front of each."""
        return RowSizes(self.lengths + tokens, self.supervised)

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return int(self.lengths.sum())

    def largest_batch(self, batch_size: int) -> tuple[int, int, int]:
        """Rows, padded length and supervised places, padding among them, that no batch exceeds.

        A batch of the longest rows and one of the most supervised rows may be two; this is as large as both.
        """
        rows = min(batch_size, len(self.lengths))
        length = bucket(max(int(self.lengths.max()) - 1, 1), LENGTH_BUCKETS)
        most = int(np.sort(self.supervised)[-rows:].sum())
        return rows, length, bucket(max(most, 1), COUNT_BUCKETS)
