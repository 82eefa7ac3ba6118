"""Evaluate, as a task of Prefect, with the comparison in its UI."""

from __future__ import annotations

import logging

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.config import EvaluateSettings, TrainSettings
from tasks.evaluate.side_by_side import Evaluation, evaluate_adapter
from tasks.evaluate.summary import evaluation_markdown
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run

log = logging.getLogger(__name__)

ARTIFACT = "evaluation"
"""Under this key Prefect's UI keeps the comparison of every run."""


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    settings: EvaluateSettings,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput,
    run: Run,
    train: TrainSettings,
) -> Evaluation:
    """Losses, answers and scores of base and tuned model, and how sure their differences are."""
    evaluation = evaluate_adapter(settings, model, adapter, data, run, train)
    _show_in_prefect(evaluation)
    return evaluation


def _show_in_prefect(evaluation: Evaluation) -> None:
    """Store the comparison as an artifact of this task run; a run is not lost for want of it."""
    try:
        create_markdown_artifact(
            evaluation_markdown(evaluation), ARTIFACT, "base beside tuned on the test rows"
        )
    except Exception as error:
        log.warning("evaluate: the comparison is not in Prefect: %s: %s", type(error).__name__, error)
