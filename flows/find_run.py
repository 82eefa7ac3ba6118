"""One run of the MLflow store, meant by its id, the beginning of its id, or its name."""

from __future__ import annotations

from flows.resume import ID_LENGTH
from tasks.config import CREDENTIALS, TrackingSettings
from tasks.errors import InputError
from tasks.tracking import StoredRun, stored_runs, tracking_uri


def newest_run(reference: str, tracking: TrackingSettings) -> StoredRun:
    """The newest run of that name, else the one run of that id: who looks at a run means the last one.

    Raises:
        InputError: there is none, or several have an id that begins like this.
    """
    named = [run for run in stored_runs(tracking) if run.name == reference]
    return named[0] if named else find_run(reference, tracking)


def find_run(reference: str, tracking: TrackingSettings) -> StoredRun:
    """The run that `reference` means, whatever its status.

    Raises:
        InputError: there is no such run, or there are several.
    """
    runs = stored_runs(tracking)
    meant = [run for run in runs if run.id.startswith(reference)] if reference else []
    meant = meant or [run for run in runs if run.name == reference]
    if not meant:
        where = CREDENTIALS.sub("://***@", tracking_uri(tracking))
        raise InputError(
            f"run '{reference}': no run of that id or name in {where}; 'tunesmith ui' shows them, "
            "MLFLOW_TRACKING_URI names another store"
        )
    if len(meant) > 1:
        each = ", ".join(f"{run.id[:ID_LENGTH]} ({run.name}, {run.status})" for run in meant)
        raise InputError(f"run '{reference}' may be any of {len(meant)}: {each}; give more of the id")
    return meant[0]
