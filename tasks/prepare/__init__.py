"""The step from rows to tokens: `prepare` in a flow, `check_source` before one starts."""

from __future__ import annotations

from prefect import task

from tasks.config import DataSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.sources import check_source
from tasks.publish import StepOutput

__all__ = ["check_source", "prepare"]


@task
def prepare(data: DataSettings, model: ModelFolder) -> StepOutput:
    """Prepare the rows of a source for a model; see `prepare_data`."""
    return prepare_data(data, model)
