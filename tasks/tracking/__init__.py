"""MLflow: the run of a finetune, written to and read. One of the two places that import mlflow."""

from tasks.tracking.charts import address_of_view
from tasks.tracking.connection import check_store, connect, send_leftovers, tracking_uri
from tasks.tracking.reading import (
    NestedRun,
    Record,
    StoredRun,
    end_run,
    nested_runs,
    newest_run_with,
    read_folder,
    read_record,
    read_text,
    stored_runs,
)
from tasks.tracking.run import Run, mlflow_run, reopened
from tasks.tracking.senders import ERROR, PROCESS

__all__ = [
    "ERROR",
    "PROCESS",
    "NestedRun",
    "Record",
    "Run",
    "StoredRun",
    "address_of_view",
    "check_store",
    "connect",
    "end_run",
    "mlflow_run",
    "nested_runs",
    "newest_run_with",
    "read_folder",
    "read_record",
    "read_text",
    "reopened",
    "send_leftovers",
    "stored_runs",
    "tracking_uri",
]
