"""Batches that drop no row: every row once an epoch, padded to its neighbours' length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tasks.prepare.splits import TokenRows

POOL_BATCHES = 16
"""Rows are sorted by length within pools of this many batches: little padding, still well mixed."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them.

    Attributes:
        inputs: (batch, length) int32 token ids.
        targets: (batch, length) int32, the token that follows each input.
        weights: (batch, length) float32, 1 where the target is supervised, else 0.
        rows: the rows' indices in their split.
        supervised_tokens: the sum of `weights`.
    """

    inputs: mx.array
    targets: mx.array
    weights: mx.array
    rows: NDArray[np.int64]
    supervised_tokens: int


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The row indices of each batch of one epoch: a function of (seed, epoch) and nothing else.

    Rows are shuffled, sorted by length within pools of `POOL_BATCHES` batches, cut into batches
    (one of them may be smaller), and the batches are shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pool = batch_size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    random.shuffle(batches)
    return batches


def training_batches(rows: TokenRows, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of epoch after epoch, without end."""
    epoch = 0
    while True:
        for indices in epoch_batches(rows.lengths, batch_size, seed, epoch):
            yield collate(rows, indices)
        epoch += 1


def steps_per_epoch(rows: TokenRows, batch_size: int) -> int:
    """Batches in one epoch; the pools are whole batches, so only the last batch can be smaller."""
    return -(-len(rows) // batch_size)


def sorted_batches(rows: TokenRows, batch_size: int) -> Iterator[Batch]:
    """Every row once, longest first: the least padding, and the peak of memory at the start."""
    order = np.argsort(-rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate(rows, order[start : start + batch_size])


def collate(rows: TokenRows, indices: NDArray[np.int64]) -> Batch:
    """Pad the given rows to the longest of them."""
    longest = max(int(rows.lengths[indices].max()), 2)
    tokens = np.zeros((len(indices), longest), dtype=np.int32)
    supervised = np.zeros((len(indices), longest), dtype=np.float32)
    for place, index in enumerate(indices):
        row, mask = rows.row(int(index))
        tokens[place, : len(row)] = row
        supervised[place, : len(row)] = mask
    return Batch(
        inputs=mx.array(tokens[:, :-1]),
        targets=mx.array(tokens[:, 1:]),
        weights=mx.array(supervised[:, 1:]),
        rows=indices,
        supervised_tokens=int(supervised[:, 1:].sum()),
    )
