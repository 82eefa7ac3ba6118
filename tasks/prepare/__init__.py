"""The step from rows to tokens: `prepare` in a flow, `check_source` before one starts."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import DataSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.sources import check_source
from tasks.publish import StepOutput
from tasks.tracking import Run

__all__ = ["check_source", "prepare"]


@task(task_run_name="prepare", cache_policy=NO_CACHE)
def prepare(data: DataSettings, model: ModelFolder, run: Run) -> StepOutput:
    """Rows, tokens and the data report, training-ready for the model."""
    return prepare_data(data, model, run)
