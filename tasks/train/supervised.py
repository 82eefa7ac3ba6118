"""The vocabulary where it is supervised and nowhere else.

The projection onto the vocabulary, with its loss, often costs more than several layers, and prompts
and padding do not need it. Here the inner model's output is gathered before the head: both stay
mlx-lm's own, so masks, rotary positions, soft-caps and tied heads are too.
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

    Args:
        inputs: (batch, length) int32 token ids.
        positions: (count,) int32, indices into the flattened inputs.

    Returns:
        (count, vocabulary) float32.
    """
    if not gathers(model, inputs):
        return plain_logits(model, inputs, positions)
    return head_logits(model, supervised_hidden(model, inputs, positions))


def gathers(model: nn.Module, inputs: mx.array) -> bool:
    """Whether head and inner model can be called apart, for this class of models.

    The first call compares with the plain forward pass on two rows of `inputs`; where they differ, or the
    model's code does not allow it, a warning is logged.
    """
    if type(model) not in _verdicts:
        _verdicts[type(model)] = _gathering_is_exact(model, inputs[:PROBE_ROWS])
    return _verdicts[type(model)]


def plain_logits(model: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
    """`supervised_logits` out of those at all positions."""
    logits: mx.array = model(inputs)  # (batch, length, vocabulary)
    return logits.reshape(-1, logits.shape[-1])[positions].astype(mx.float32)


def supervised_hidden(model: nn.Module, inputs: mx.array, positions: mx.array) -> mx.array:
    """What the head is given at the chosen positions, (count, hidden)."""
    hidden: mx.array = model.model(inputs)  # (batch, length, hidden)
    return hidden.reshape(-1, hidden.shape[-1])[positions]


def head_logits(model: nn.Module, hidden: mx.array) -> mx.array:
    """The logits of hidden states: (count, hidden) → (count, vocabulary) float32."""
    with _answering(model.model, hidden[None]):
        logits: mx.array = model(mx.zeros((1, len(hidden)), mx.int32))
    return logits.squeeze(0).astype(mx.float32)


@contextmanager
def _answering(inner: nn.Module, hidden: mx.array) -> Iterator[None]:
    """Let this one instance answer any call with `hidden`.

    The instance's class is exchanged for a subclass and back: parameter names do not change, and
    no other model is touched.
    """
    plain = type(inner)

    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        return hidden

    inner.__class__ = type(plain.__name__, (plain,), {"__call__": answer})
    try:
        yield
    finally:
        inner.__class__ = plain


def _gathering_is_exact(model: nn.Module, inputs: mx.array) -> bool:
    """Compare both ways at every third position, in evaluation mode so that dropout cannot differ."""
    positions = mx.arange(0, inputs.size, 3)
    try:
        with evaluating(model):
            plain = log_probabilities(plain_logits(model, inputs, positions))
            gathered = log_probabilities(head_logits(model, supervised_hidden(model, inputs, positions)))
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
