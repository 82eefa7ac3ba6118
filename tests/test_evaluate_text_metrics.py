"""Scores agree with sacrebleu and rouge-score called directly, and with what they say they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu as sacrebleu_corpus_bleu
from sacrebleu import sentence_chrf

from tasks.evaluate.rouge import rouge_l
from tasks.evaluate.text_metrics import (
    bleu_counts,
    chrf,
    corpus_bleu,
    exact_match,
    format_valid,
    normalised,
    repetition,
    row_scores,
    signatures,
)

PAIRS = [
    (
        "Remove any common leading whitespace.",
        "Remove all common leading whitespace from every line in text.",
    ),
    ("", "Return the absolute value of the argument."),
    ("Blue", "blue"),
    ("The cat sat on the mat, the cat.", "A cat sat on a mat; the dog did not."),
    ("naïve café — 日本語", "naive cafe - 日本語"),
    ("It is 42.", "It is 42."),
]
WORDS = some.lists(
    some.sampled_from(["a", "cat", "sat", "on", "mat", "B2", "don't", "über", "."]), max_size=25
)


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_chrf_is_sacrebleus(answer: str, reference: str) -> None:
    assert chrf(answer, reference) == pytest.approx(sentence_chrf(answer, [reference]).score)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_is_that_of_rouge_score(answer: list[str], reference: list[str]) -> None:
    ours = rouge_l(" ".join(answer), " ".join(reference))
    theirs = SCORER.score(" ".join(reference), " ".join(answer))["rougeL"].fmeasure
    assert ours == pytest.approx(100 * theirs)


SCORER = RougeScorer(["rougeL"])


@pytest.mark.parametrize("rows", [PAIRS, PAIRS[:1], PAIRS[1:2], PAIRS[3:]])
def test_bleu_of_summed_counts_is_sacrebleus_of_the_corpus(rows: list[tuple[str, str]]) -> None:
    sums = np.sum([bleu_counts(answer, reference) for answer, reference in rows], axis=0)
    answers, references = zip(*rows, strict=True)
    assert corpus_bleu(sums) == pytest.approx(sacrebleu_corpus_bleu(answers, [references]).score)


def test_chrf_says_something_of_a_short_answer_where_bleu_does_not() -> None:
    answer, reference = "It is green", "It is blue"
    assert corpus_bleu(bleu_counts(answer, reference)) == 0
    assert chrf(answer, reference) > 20


def test_signatures_name_the_version_that_computed_the_scores() -> None:
    assert signatures()["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert signatures()["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


@pytest.mark.parametrize(
    ("answer", "reference", "raw", "easy"),
    [
        ("Paris", " Paris\n", 1, 1),
        ("the Paris.", "paris", 0, 1),
        ("Theatre", "atre", 0, 0),
        ("an  apple a day", "Apple, day!", 0, 1),
        ("", "", 1, 1),
    ],
)
def test_exact_match_is_raw_and_normalised(answer: str, reference: str, raw: float, easy: float) -> None:
    assert exact_match(answer, reference) == raw
    assert exact_match(normalised(answer), normalised(reference)) == easy


@pytest.mark.parametrize(
    ("answer", "wanted", "valid"),
    [
        ('{"city": "Paris"}', "json", 1),
        (" [1, 2]\n", "json", 1),
        ('{"city": "Paris"} and more', "json", 0),
        ("{city: Paris}", "json", 0),
        ("[" * 100_000, "json", 0),
        ("yes", "yes|no", 1),
        ("yes, or no", "yes|no", 0),
        ("Answer: 4\nBecause.", "Answer: .*", 1),
    ],
)
def test_a_format_holds_for_the_whole_answer(answer: str, wanted: str, valid: float) -> None:
    assert format_valid(answer, wanted) == valid
    assert row_scores(answer[:50], "x", wanted).keys() - row_scores(answer[:50], "x").keys() == {
        "format_valid"
    }


def test_repetition_is_the_share_of_runs_of_four_words_seen_before() -> None:
    assert repetition("one two three four five") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("again " * 100) == pytest.approx(96 / 97)
    assert repetition("too short") == 0


def test_an_empty_answer_is_counted_and_scores_nothing() -> None:
    scores = row_scores("  ", "Something.")
    assert scores["empty"] == 1
    assert scores["chrf"] == scores["rouge_l"] == scores["exact_match"] == 0
