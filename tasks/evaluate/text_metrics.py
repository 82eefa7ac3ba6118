"""Scores of answers against their references, row by row and over all rows.

chrF stands first: it is steady on answers of a few words, where BLEU is 0.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.rouge import rouge_l

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

LOWER_IS_BETTER = frozenset(
    {"test_loss", "perplexity", "general_loss", "empty", "repetition", "cut_off", "latency_s"}
)
"""Figures of a measurement that a better model has lower; all others it has higher."""

BLEU_ORDER = 4
REPEATED_WORDS = 4
"""Words in a row whose repetition counts; seq-rep-4 of Welleck et al. 2020, arXiv:1908.04319."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def row_scores(answer: str, reference: str, answer_format: str | None = None) -> dict[str, float]:
    """Every score of one answer: chrF and ROUGE-L from 0 to 100, shares from 0 to 1.

    Args:
        answer_format: "json" or a regular expression, or None; without it there is no `format_valid`.
    """
    scores = {
        "chrf": chrf(answer, reference),
        "rouge_l": rouge_l(answer, reference),
        "exact_match": exact_match(answer, reference),
        "exact_match_normalised": exact_match(normalised(answer), normalised(reference)),
    }
    if answer_format is not None:
        scores["format_valid"] = format_valid(answer, answer_format)
    return {**scores, "empty": float(not answer.strip()), "repetition": repetition(answer)}


def chrf(answer: str, reference: str) -> float:
    """chrF2, 0 to 100 (Popović 2015, by sacrebleu)."""
    return float(_chrf_metric().sentence_score(answer, [reference]).score)


def exact_match(answer: str, reference: str) -> float:
    """1.0 when the texts are equal but for white space around them, else 0.0."""
    return float(answer.strip() == reference.strip())


def normalised(text: str) -> str:
    """In lower case, without punctuation, articles and extra white space, as SQuAD compares answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def format_valid(answer: str, answer_format: str) -> float:
    """1.0 when the whole answer is JSON, or matches the regular expression, else 0.0."""
    answer = answer.strip()
    if answer_format != "json":
        return float(re.fullmatch(answer_format, answer, re.DOTALL) is not None)
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def repetition(answer: str) -> float:
    """The share of an answer's runs of four words that stood in it before."""
    words = answer.split()
    runs = [tuple(words[at : at + REPEATED_WORDS]) for at in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def bleu_counts(answer: str, reference: str) -> list[int]:
    """What BLEU sums over rows: lengths of answer and reference, matching n-grams, n-grams; (10,)."""
    found = _bleu_metric().sentence_score(answer, [reference])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def corpus_bleu(sums: Sequence[float] | NDArray[np.float64]) -> float:
    """BLEU, 0 to 100, of the summed `bleu_counts` of some rows: sacrebleu's corpus BLEU of those rows."""
    from sacrebleu.metrics.bleu import BLEU

    answered, referred, *ngrams = (int(value) for value in sums)
    matching, total = ngrams[:BLEU_ORDER], ngrams[BLEU_ORDER:]
    return float(BLEU.compute_bleu(matching, total, answered, referred, smooth_method="exp").score)


def signatures() -> dict[str, str]:
    """How chrF and BLEU are computed, in sacrebleu's words, by which others compute the same."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    written = {}
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        metric.corpus_score(["a"], [["a"]])  # a signature counts the references it has seen
        written[name] = str(metric.get_signature())
    return written


@cache
def _chrf_metric() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _bleu_metric() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # sacrebleu warns of rows by themselves without; counts are the same
