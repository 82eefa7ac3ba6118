"""ROUGE-L, the F-measure of the longest common subsequence of words (Lin 2004)."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[a-z0-9]+")


def rouge_l(answer: str, reference: str) -> float:
    """0 to 100; the same figure as rouge-score 0.1.2 without stemming, times 100.

    Words are runs of ASCII letters and digits, in lower case, as there: for other scripts chrF says more.
    """
    ours, theirs = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    common = _longest_common_subsequence(ours, theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 100 * 2 * precision * recall / (precision + recall)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by dynamic programming in one row."""
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = best[place]
            best[place] = diagonal + 1 if word == other else max(above, best[place - 1])
            diagonal = above
    return best[-1]
