"""Logits where they are supervised and nowhere else.

The projection onto the vocabulary, with its loss, often costs more than several layers, and prompts
and padding do not need it. Here the inner model's output is gathered before the head: the model
stays mlx-lm's own, so masks, rotary positions, soft-caps and tied heads are too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tasks.train.evaluating import evaluating

log = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Largest difference of log-probabilities from the plain forward pass: bfloat16 rounding, no more."""

PROBE_ROWS = 2

_verdicts: dict[type, bool] = {}
"""Whether gathering equals the plain forward pass, by class of model: a class's code decides it."""


def supervised_logits(model: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
    """Logits in float32 at chosen positions.

    The first call for a class of models compares them with the plain forward pass on two rows;
    where they differ, or the model's code does not allow gathering, the plain pass is used, with a
    warning.

    Args:
        inputs: (batch, length) int32 token ids.
        positions: (count,) int32, indices into the flattened inputs.

    Returns:
        (count, vocabulary) float32.
    """
    if type(model) not in _verdicts:
        _verdicts[type(model)] = _gathering_is_exact(model, inputs[:PROBE_ROWS])
    logits = _gathered if _verdicts[type(model)] else _plain
    return logits(model, inputs, positions).astype(mx.float32)


def _plain(model: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
    logits: mx.array = model(inputs)  # (batch, length, vocabulary)
    return logits.reshape(-1, logits.shape[-1])[positions]


def _gathered(model: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
    with _gathering(model.model, positions):
        return mx.squeeze(model(inputs), 0)  # (1, count, vocabulary) without its batch


@contextmanager
def _gathering(inner: nn.Module, positions: mx.array) -> Iterator[None]:
    """Let this one instance return only the given positions of its output, as one row of a batch.

    The instance's class is exchanged for a subclass and back: parameter names do not change, and
    no other model is touched.
    """
    plain = type(inner)

    def gather(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        hidden: mx.array = plain.__call__(self, *args, **kwargs)  # (batch, length, hidden)
        return hidden.reshape(-1, hidden.shape[-1])[positions][None]  # (1, count, hidden)

    inner.__class__ = type(plain.__name__, (plain,), {"__call__": gather})
    try:
        yield
    finally:
        inner.__class__ = plain


def _gathering_is_exact(model: nn.Module, inputs: mx.array) -> bool:
    """Compare both ways at every third position, in evaluation mode so that dropout cannot differ."""
    positions = mx.arange(0, inputs.size, 3)
    try:
        with evaluating(model):
            plain = log_probabilities(_plain(model, inputs, positions))
            gathered = log_probabilities(_gathered(model, inputs, positions))
        if plain.shape == gathered.shape and float(mx.abs(plain - gathered).max()) <= TOLERANCE:
            return True
        reason = "its logits differ"
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        reason = str(error)
    log.warning(
        "%s: logits cannot be computed at supervised positions only (%s); training is slower",
        type(model).__module__,
        reason,
    )
    return False


def log_probabilities(logits: mx.array) -> mx.array:
    """Of logits (…, vocabulary), in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
