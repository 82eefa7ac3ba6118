"""Base beside tuned, on the same rows: what changed, and whether that is more than chance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.config import EvaluateSettings, TrainSettings
from tasks.evaluate.intervals import Interval, interval, mean_interval, ratio_interval
from tasks.evaluate.measure import EVALUATION_FILE, Pair, measure
from tasks.evaluate.text_metrics import LOWER_IS_BETTER, corpus_bleu, signatures
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run

NOT_SCORES = {"prompt", "reference", "answer", "tokens", "seconds", "finished", "bleu_counts"}
"""Columns of an answer that are no scores."""

SHOWN_ROWS = 5
"""Of the worst and of the best answers."""


@dataclass(frozen=True)
class Evaluation:
    """Two measurements on the same test rows.

    Attributes:
        base, tuned: outputs of `tasks.evaluate.measure.measure`.
        test_data: fingerprint of the prepared data; figures compare only where it is equal.
        seed: of the intervals.
    """

    base: StepOutput
    tuned: StepOutput
    test_data: str
    seed: int = 0

    @property
    def reused(self) -> bool:
        """Neither side was measured anew."""
        return self.base.reused and self.tuned.reused

    @property
    def why(self) -> str:
        """What had changed where a side was measured anew; the tuned one is that of this run."""
        return self.tuned.why or self.base.why

    @property
    def seconds(self) -> float:
        """Time spent measuring."""
        return self.base.seconds + self.tuned.seconds

    def figures(self) -> dict[str, dict[str, Any]]:
        """`{"base": {...}, "tuned": {...}}` as measured."""
        return {
            "base": self.base.read_json(EVALUATION_FILE),
            "tuned": self.tuned.read_json(EVALUATION_FILE),
        }

    def changes(self) -> Mapping[str, Interval]:
        """By figure, tuned minus base with its 95% interval over the rows."""
        return _changes_of(self.base.path, self.tuned.path, self.seed)


def evaluate_adapter(
    settings: EvaluateSettings,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput,
    run: Run,
    train: TrainSettings,
) -> Evaluation:
    """Measure base and tuned model and log both, with what changed.

    Logged are `base/…`, `test/…` and `change/…` metrics (the latter tuned minus base, with the ends of
    the 95% interval as `…_low` and `…_high`), how chrF and BLEU are computed as tags, and a table of answers.
    Of the `train` settings those of the frozen prefix are read.
    """
    pair = Pair(adapter.path, train)
    evaluation = Evaluation(
        base=measure(settings, model, None, data, pair=pair),
        tuned=measure(settings, model, adapter, data, pair=pair),
        test_data=data.fingerprint,
        seed=settings.seed,
    )
    figures = evaluation.figures()
    base, tuned = figures["base"], figures["tuned"]
    metrics = {f"base/{name}": value for name, value in numbers(base).items()}
    metrics |= {f"test/{name}": value for name, value in numbers(tuned).items()}
    for name, found in evaluation.changes().items():
        metrics |= {f"change/{name}": found.change}
        if math.isfinite(found.high):
            metrics |= {f"change/{name}_low": found.low, f"change/{name}_high": found.high}
    run.report(0, {"test_loss": tuned["test_loss"], **metrics})
    if "answers" in tuned:
        run.set_tags({f"tunesmith.{name}": written for name, written in signatures().items()})
        run.log_table(answer_table(base["answers"], tuned["answers"]), "evaluation.json")
    return evaluation


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a measurement that are one number each."""
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def compared(base: Mapping[str, Any], tuned: Mapping[str, Any], seed: int) -> dict[str, Interval]:
    """What changed from one measurement to another on the same rows, by figure, with 95% intervals.

    A loss is compared by the rows' sums, weighted by their tokens; scores of answers row by row.
    """
    found = {"test_loss": _loss_interval(base["rows"], tuned["rows"], seed)}
    found["token_accuracy"] = ratio_interval(
        *_columns(base["rows"], tuned["rows"], "correct"), _column(base["rows"], "tokens"), seed
    )
    general = base.get("general"), tuned.get("general")
    if all(general) and general[0]["texts"] == general[1]["texts"]:  # type: ignore[index]
        found["general_loss"] = _loss_interval(general[0]["rows"], general[1]["rows"], seed)  # type: ignore[index]
    before, after = base.get("answers", []), tuned.get("answers", [])
    if before and _same_questions(before, after):
        for name in score_names(before):
            if name in after[0]:
                found[name] = mean_interval(*_columns(before, after, name), seed)
        found["bleu"] = _bleu_interval(before, after, seed)
    return found


def better(name: str, found: Interval) -> bool | None:
    """Whether the change of a figure is for the better; None where it may be chance."""
    if not found.excludes_zero:
        return None
    return (found.high < 0) == (name in LOWER_IS_BETTER)


def score_names(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of answers that are scores."""
    return [name for name in answers[0] if name not in NOT_SCORES]


def answer_table(
    base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """The answers by columns, the worst tuned ones first: prompt, reference, base, tuned, scores of both."""
    order = from_worst(tuned)
    table = {
        "prompt": [tuned[row]["prompt"] for row in order],
        "reference": [tuned[row]["reference"] for row in order],
        "base": [base[row]["answer"] for row in order],
        "tuned": [tuned[row]["answer"] for row in order],
    }
    for name in score_names(tuned):
        table[f"base {name}"] = [round(base[row][name], 4) for row in order]
        table[f"tuned {name}"] = [round(tuned[row][name], 4) for row in order]
    return table


def from_worst(answers: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the answers by their chrF, the lowest first."""
    return sorted(range(len(answers)), key=lambda row: (answers[row]["chrf"], row))


def worst_and_best(answers: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """The places of some of the worst answers, and of some of the best, best first; none is in both."""
    order = from_worst(answers)
    count = min(SHOWN_ROWS, (len(order) + 1) // 2)
    return order[:count], order[count:][::-1][:SHOWN_ROWS]


@cache
def _changes_of(base: Path, tuned: Path, seed: int) -> Mapping[str, Interval]:
    """Of published outputs, which never change."""
    before, after = (
        json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8")) for folder in (base, tuned)
    )
    return compared(before, after, seed)


def _loss_interval(
    base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], seed: int
) -> Interval:
    return ratio_interval(*_columns(base, tuned, "nll"), _column(base, "tokens"), seed)


def _bleu_interval(
    base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], seed: int
) -> Interval:
    before, after = (np.array(_column(rows, "bleu_counts"), np.float64).T for rows in (base, tuned))
    half = len(before)

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([corpus_bleu(row[half:]) - corpus_bleu(row[:half]) for row in sums])

    return interval(np.concatenate([before, after]), difference, seed)


def _columns(
    base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[Any], list[Any]]:
    return _column(base, name), _column(tuned, name)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _same_questions(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> bool:
    return [(row["prompt"], row["reference"]) for row in base] == [
        (row["prompt"], row["reference"]) for row in tuned
    ]
