"""Losses on fixed rows, row by row, so that two models can be compared on the same ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.prepare.splits import TokenRows

if TYPE_CHECKING:
    import mlx.nn as nn


def measure_losses(model: nn.Module, rows: TokenRows, batch_size: int, title: str) -> dict[str, Any]:
    """What a model, base or tuned, makes of the supervised tokens of some rows.

    Returns:
        `loss` (nats a supervised token), `perplexity`, `token_accuracy` (share of the tokens that the
        model finds likeliest), and `rows`: `nll` (summed over the row), `correct` and `tokens` of each.
        NaN where no token is supervised.
    """
    from tasks.train.loss import row_losses
    from tasks.train.soft_prompt import prefix_ids, with_prefix

    found = row_losses(model, with_prefix(rows, prefix_ids(model)), batch_size, title)
    count = int(found.tokens.sum())
    loss = float(found.nll.sum()) / count if count else math.nan
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": float(found.correct.sum()) / count if count else math.nan,
        "rows": [
            {"nll": nll, "correct": correct, "tokens": tokens}
            for nll, correct, tokens in zip(
                found.nll.tolist(), found.correct.tolist(), found.tokens.tolist(), strict=True
            )
        ],
    }


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is over what a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
