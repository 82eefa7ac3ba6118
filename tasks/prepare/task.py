"""Prepare, as a task of Prefect, with the data report in its UI."""

from __future__ import annotations

import logging

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.config import DataSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.page import report_markdown
from tasks.prepare.pipeline import prepare_data
from tasks.publish import StepOutput
from tasks.tracking import Run

log = logging.getLogger(__name__)

ARTIFACT = "data-report"
"""Under this key Prefect's UI keeps the report of every run (lowercase letters, digits and dashes only)."""


@task(task_run_name="prepare", cache_policy=NO_CACHE)
def prepare(data: DataSettings, model: ModelFolder, run: Run) -> StepOutput:
    """Rows, tokens and the data report, training-ready for the model."""
    output = prepare_data(data, model, run)
    _show_in_prefect(output)
    return output


def _show_in_prefect(output: StepOutput) -> None:
    """Store the report as an artifact of this task run; a run is not lost for want of it."""
    try:
        markdown = report_markdown(output.read_json("report.json"))
        create_markdown_artifact(markdown, ARTIFACT, "what was read, what is used, what will be learnt")
    except Exception as error:
        log.warning("prepare: the data report is not in Prefect: %s: %s", type(error).__name__, error)
