"""Report: one page a run."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.report.page import Finished, write_report


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(finished: Finished) -> Path:
    """The run on one self-contained HTML page."""
    return write_report(finished)
