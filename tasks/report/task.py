"""Report, as a task of Prefect."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.report.finished import Finished
from tasks.report.write import write_report


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(finished: Finished) -> Path:
    """The run on one self-contained HTML page, and the same in Markdown."""
    return write_report(finished)
