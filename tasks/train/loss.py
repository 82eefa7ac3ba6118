"""The loss, the same in training, validation and test: cross-entropy, a mean over supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.batches import Batch, sorted_batches
from tasks.train.evaluating import evaluating
from tasks.train.head_loss import token_losses, weighted_loss
from tasks.train.substitution import inject
from tasks.train.supervised import gathers, plain_logits, supervised_hidden


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
    with progress(title, total=len(rows)) as bar, evaluating(model):
        for batch in sorted_batches(rows, batch_size):
            if cancelled():
                total = math.nan
                break
            if batch.supervised_tokens:
                total += float(summed_loss(model, *batch.arrays()))
                count += batch.supervised_tokens
            bar.advance(len(batch.rows))
    return total / count if count else math.nan
