"""Evaluate: the fixed test rows, base beside tuned."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import EvaluateSettings, TrainSettings
from tasks.evaluate.side_by_side import Evaluation, evaluate_adapter
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run


@task(task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    settings: EvaluateSettings,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput,
    run: Run,
    train: TrainSettings,
) -> Evaluation:
    """Losses, answers and scores of base and tuned model."""
    return evaluate_adapter(settings, model, adapter, data, run, train)
