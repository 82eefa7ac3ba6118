"""Batches that drop no row: every row once an epoch, padded to its neighbours' length.

Rows without a supervised token teach nothing and take no part: their mean loss would be 0/0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tasks.prepare.splits import TokenRows
from tasks.train.prefix_cache import PrefixedRows

POOL_BATCHES = 32
"""Rows are sorted by length within pools of this many batches: little padding, still well mixed.

Within a pool the padding telescopes to at most `batch_size` times the pool's range of lengths. Of a
large set's tokens that is at most (longest - shortest) / (32 x mean length): 6% where lengths are
uniform in 10 to 400. Measured with 5,000 rows in batches of 4: 2.2% there, 10% for log-normal
lengths (sigma 1, median 120, cut at 2,048), 2.2% for a mix of rows of 20 to 60 and 800 to 1,000.
"""


LENGTH_BUCKETS, COUNT_BUCKETS = 16, 8
"""Lengths and numbers of supervised tokens to an octave: 3 and 6% more work on average, for at most 16 x 8
shapes an octave that have to be compiled, of which real rows show a few dozen."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, to few different shapes (`bucket`), each of which is compiled once.

    Attributes:
        inputs: (batch, length) int32 token ids.
        positions: (count,) int32, where in the flattened inputs the next token is supervised.
        targets: (count,) int32, those next tokens.
        weights: (count,) float32: 1, and 0 where positions and targets are padding.
        hidden: (batch, length, hidden) entering the first layer that is not frozen, where it is known.
        rows: the rows' indices in their split.
        supervised_tokens: tokens that the batch teaches: the sum of `weights`.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    hidden: mx.array | None
    rows: NDArray[np.int64]
    supervised_tokens: int

    def arrays(self) -> tuple[mx.array, ...]:
        """What a loss is computed from: inputs, positions, targets, weights, and hidden where it is known."""
        known = (self.inputs, self.positions, self.targets, self.weights)
        return known if self.hidden is None else (*known, self.hidden)


def bucket(count: int, steps: int) -> int:
    """The least number from `count` up of those that divide each octave into `steps`: few, and close by."""
    step = max(1, (1 << (max(count - 1, 1).bit_length() - 1)) // steps)
    return math.ceil(count / step) * step


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


@dataclass(frozen=True)
class Group:
    """The batches of one update.

    Attributes:
        epoch: of the batch that comes after this group, from 0.
        position: batches of that epoch that are done then.
    """

    batches: list[Batch]
    epoch: int
    position: int

    @property
    def supervised_tokens(self) -> int:
        """Tokens that the update teaches."""
        return sum(batch.supervised_tokens for batch in self.batches)


def update_groups(
    rows: TokenRows, batch_size: int, accumulation_steps: int, seed: int, epoch: int = 0, position: int = 0
) -> Iterator[Group]:
    """The groups of batches of update after update, from a place on without end.

    A group never crosses the border of an epoch: the last one of an epoch may hold fewer batches.
    """
    teaching = np.flatnonzero(rows.supervised_counts)
    lengths = rows.lengths[teaching]
    while True:
        order = epoch_batches(lengths, batch_size, seed, epoch)
        for start in range(position, len(order), accumulation_steps):
            members = order[start : start + accumulation_steps]
            batches = [collate(rows, teaching[indices]) for indices in members]
            after = start + len(members)
            yield Group(batches, *((epoch, after) if after < len(order) else (epoch + 1, 0)))
        epoch, position = epoch + 1, 0


def updates_per_epoch(rows: TokenRows, batch_size: int, accumulation_steps: int) -> int:
    """Updates in one epoch; the pools are whole batches, so only the last batch can be smaller."""
    teaching = int(np.count_nonzero(rows.supervised_counts))
    return math.ceil(math.ceil(teaching / batch_size) / accumulation_steps)


def sorted_batches(rows: TokenRows, batch_size: int) -> Iterator[Batch]:
    """Every row once, longest first: the least padding, and the peak of memory at the start."""
    order = np.argsort(-rows.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate(rows, order[start : start + batch_size])


def collate(rows: TokenRows, indices: NDArray[np.int64]) -> Batch:
    """Pad the given rows, and what they supervise, to the next bucket."""
    longest = int(rows.lengths[indices].max())
    length = bucket(max(longest - 1, 1), LENGTH_BUCKETS)
    tokens, supervised = rows.padded(indices, length + 1)
    positions = np.flatnonzero(supervised[:, 1:])
    count = len(positions)
    empty = np.zeros(bucket(max(count, 1), COUNT_BUCKETS) - count, np.int32)
    targets = np.concatenate([tokens[:, 1:].reshape(-1)[positions], empty])
    return Batch(
        inputs=mx.array(tokens[:, :-1]),
        positions=mx.array(np.concatenate([positions.astype(np.int32), empty])),
        targets=mx.array(targets),
        weights=mx.array((np.arange(len(targets)) < count).astype(np.float32)),
        hidden=rows.padded_hidden(indices, length) if isinstance(rows, PrefixedRows) else None,
        rows=indices,
        supervised_tokens=count,
    )
