"""Scores of one answer against its reference."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.chrf import CHRF


def chrf(answer: str, reference: str) -> float:
    """chrF2, 0 to 100 (Popović 2015, by sacrebleu): steadier than BLEU on short answers."""
    return float(_chrf_metric().sentence_score(answer, [reference]).score)


def exact_match(answer: str, reference: str) -> float:
    """1.0 when the texts are equal but for white space around them, else 0.0."""
    return float(answer.strip() == reference.strip())


@cache
def _chrf_metric() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
