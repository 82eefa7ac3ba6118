"""The loss, the same in training, validation and test: cross-entropy, a mean over supervised tokens."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.train.batches import Batch, sorted_batches


def batch_loss(model: nn.Module, inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Mean cross-entropy in nats over the supervised targets of one batch.

    Args:
        model: gives logits, (batch, length, vocabulary), for token ids.
        inputs, targets: (batch, length) int32.
        weights: (batch, length) float32, 1 where supervised; at least one of them 1.
    """
    logits = model(inputs).astype(mx.float32)  # (batch, length, vocabulary)
    losses = nn.losses.cross_entropy(logits, targets)  # (batch, length)
    return (losses * weights).sum() / weights.sum()


def mean_loss(model: nn.Module, rows: TokenRows, batch_size: int, title: str) -> float:
    """Mean cross-entropy in nats over every supervised token of `rows`; reads no random state.

    The model is put into evaluation mode and left in the mode it was in. NaN for rows without a
    supervised token.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with progress(title, total=len(rows)) as bar:
        for batch in sorted_batches(rows, batch_size):
            if batch.supervised_tokens:
                loss = batch_loss(model, batch.inputs, batch.targets, batch.weights)
                total += float(loss) * batch.supervised_tokens
                count += batch.supervised_tokens
            bar.advance(len(batch.rows))
    model.train(training)
    return total / count if count else math.nan


def supervised(batch: Batch) -> bool:
    """Whether the batch teaches anything; its mean would be 0/0 otherwise."""
    return batch.supervised_tokens > 0
