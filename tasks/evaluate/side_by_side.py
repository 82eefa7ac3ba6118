"""Base beside tuned, on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.config import EvaluateSettings, TrainSettings
from tasks.evaluate.measure import EVALUATION_FILE, Pair, measure
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run


@dataclass(frozen=True)
class Evaluation:
    """Two measurements on the same test rows.

    Attributes:
        base, tuned: outputs of `tasks.evaluate.measure.measure`.
        test_data: fingerprint of the prepared data; figures compare only where it is equal.
    """

    base: StepOutput
    tuned: StepOutput
    test_data: str

    @property
    def reused(self) -> bool:
        """Neither side was measured anew."""
        return self.base.reused and self.tuned.reused

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


def evaluate_adapter(
    settings: EvaluateSettings,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput,
    run: Run,
    train: TrainSettings,
) -> Evaluation:
    """Measure base and tuned model and log both: `base/…` and `test/…` metrics and a table of answers.

    Of the `train` settings those of the frozen prefix are read.
    """
    pair = Pair(adapter.path, train)
    evaluation = Evaluation(
        base=measure(settings, model, None, data, pair),
        tuned=measure(settings, model, adapter, data, pair),
        test_data=data.fingerprint,
    )
    figures = evaluation.figures()
    base, tuned = figures["base"], figures["tuned"]
    numbers = {f"base/{name}": value for name, value in base.items() if isinstance(value, float)}
    numbers |= {f"test/{name}": value for name, value in tuned.items() if isinstance(value, float)}
    run.report(0, {"test_loss": tuned["test_loss"], **numbers})
    if "answers" in tuned:
        run.log_table(_columns(base["answers"], tuned["answers"]), "evaluation.json")
    return evaluation


def _columns(base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {
        "prompt": [row["prompt"] for row in tuned],
        "reference": [row["reference"] for row in tuned],
        "base": [row["answer"] for row in base],
        "tuned": [row["answer"] for row in tuned],
        "base chrF": [round(row["chrf"], 1) for row in base],
        "tuned chrF": [round(row["chrf"], 1) for row in tuned],
    }
