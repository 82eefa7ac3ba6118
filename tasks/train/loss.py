"""The loss, the same in training, validation and test: cross-entropy, a mean over supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.batches import Batch, sorted_batches
from tasks.train.evaluating import evaluating
from tasks.train.head_loss import chunks, token_losses, weighted_loss
from tasks.train.substitution import inject
from tasks.train.supervised import gathers, head_logits, plain_logits, supervised_hidden


def batch_loss(model: nn.Module, batch: Batch) -> mx.array:
    """Mean cross-entropy in nats over the supervised tokens of one batch, which has at least one."""
    return summed_loss(model, *batch.arrays()) / batch.supervised_tokens


def summed_loss(
    model: nn.Module,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
    hidden: mx.array | None = None,
) -> mx.array:
    """Sum of the cross-entropy in nats over the supervised tokens of a batch; arrays as in `Batch`."""
    inject(model, hidden)
    if gathers(model, inputs):
        return weighted_loss(model, supervised_hidden(model, inputs, positions), targets, weights)
    losses = token_losses(plain_logits(model, inputs, positions), targets)
    return mx.sum(losses * weights)


def mean_loss(
    model: nn.Module,
    rows: TokenRows,
    batch_size: int,
    title: str,
    cancelled: Callable[[], bool] = lambda: False,
) -> float:
    """Mean cross-entropy in nats over every supervised token of `rows`; reads no random state.

    The model is put into evaluation mode and left in the mode it was in. NaN for rows without a
    supervised token.

    Args:
        cancelled: asked before each batch; once it says yes, the work ends and the result is NaN.
    """
    total, count = 0.0, 0
    under_way = mx.zeros(())
    with progress(title, total=len(rows)) as bar, evaluating(model):
        for batch in sorted_batches(rows, batch_size):
            if cancelled():
                return math.nan
            if batch.supervised_tokens:
                loss = summed_loss(model, *batch.arrays())
                mx.async_eval(loss)
                total += float(under_way)  # of the batch before: the machine is never left without work
                under_way = loss
                count += batch.supervised_tokens
            bar.advance(len(batch.rows))
    return (total + float(under_way)) / count if count else math.nan


@dataclass(frozen=True)
class RowLosses:
    """What a model makes of each row.

    Attributes:
        nll: (rows,) float64, summed cross-entropy in nats over the row's supervised tokens.
        correct: (rows,) int64, supervised tokens that the model finds likeliest of all.
        tokens: (rows,) int64, supervised tokens.
    """

    nll: NDArray[np.float64]
    correct: NDArray[np.int64]
    tokens: NDArray[np.int64]


def row_losses(model: nn.Module, rows: TokenRows, batch_size: int, title: str) -> RowLosses:
    """The terms of `mean_loss`, row by row: `nll.sum() / tokens.sum()` is the same figure.

    Rows without a supervised token have zeros.
    """
    nll = np.zeros(len(rows))
    correct, tokens = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    with progress(title, total=len(rows)) as bar, evaluating(model):
        for batch in sorted_batches(rows, batch_size):
            if batch.supervised_tokens:
                losses, hits = _token_losses(model, batch)
                positions = np.array(batch.positions[: batch.supervised_tokens])
                of = batch.rows[positions // batch.inputs.shape[1]]  # (count,)
                np.add.at(nll, of, losses)
                np.add.at(correct, of, hits)
                np.add.at(tokens, of, 1)
            bar.advance(len(batch.rows))
    return RowLosses(nll, correct, tokens)


def _token_losses(model: nn.Module, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each supervised token, (count,): its cross-entropy, and 1 where it is the likeliest."""
    count = batch.supervised_tokens
    positions, targets = batch.positions[:count], batch.targets[:count]
    inject(model, batch.hidden)
    if not gathers(model, batch.inputs):
        return _judged(plain_logits(model, batch.inputs, positions), targets)
    hidden = supervised_hidden(model, batch.inputs, positions)
    parts = [_judged(head_logits(model, hidden[part]), targets[part]) for part in chunks(model, hidden)]
    losses, hits = zip(*parts, strict=True)
    return np.concatenate(losses), np.concatenate(hits)


def _judged(logits: mx.array, targets: mx.array) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    losses, hits = token_losses(logits, targets), mx.argmax(logits, axis=-1) == targets
    mx.eval(losses, hits)
    return np.array(losses, np.float64), np.array(hits, np.int64)
