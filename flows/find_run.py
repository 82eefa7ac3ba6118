"""Runs of the MLflow store, meant by their id, the beginning of it, or their name."""

from __future__ import annotations

from tasks.config import CREDENTIALS, TrackingSettings
from tasks.errors import InputError
from tasks.tracking import StoredRun, stored_runs, tracking_uri

ID_LENGTH = 8
"""Of an id, so much is shown."""

SHORTEST_ID = 4
"""Of an id so much is asked for, lest a word be taken for the beginning of one."""


def find_run(reference: str, tracking: TrackingSettings) -> StoredRun:
    """The run that `reference` means; of several of one name the newest that is finished.

    Raises:
        InputError: there is no such run, or several have an id that begins like this.
    """
    runs = matching_runs(reference, tracking)
    if not runs:
        raise InputError(no_run(reference, tracking))
    if all(run.name == reference for run in runs):
        return next((run for run in runs if run.status == "FINISHED"), runs[0])
    return the_one(reference, runs)


def matching_runs(reference: str, tracking: TrackingSettings) -> list[StoredRun]:
    """The runs of this name, or else those whose id begins like this; newest first."""
    runs = stored_runs(tracking)
    named = [run for run in runs if run.name == reference]
    return named or [run for run in runs if len(reference) >= SHORTEST_ID and run.id.startswith(reference)]


def the_one(reference: str, runs: list[StoredRun]) -> StoredRun:
    """The only one of `runs`.

    Raises:
        InputError: there are several.
    """
    if len(runs) > 1:
        each = ", ".join(f"{run.id[:ID_LENGTH]} ({run.name}, {run.status})" for run in runs[:5])
        raise InputError(f"run '{reference}' may be any of {len(runs)}: {each}; give more of the id")
    return runs[0]


def no_run(reference: str, tracking: TrackingSettings) -> str:
    """That no run is meant by `reference`, and where one was looked for."""
    return (
        f"run '{reference}': no run of that id or name in {store_name(tracking)}; 'tunesmith ui' shows them, "
        "MLFLOW_TRACKING_URI names another store"
    )


def store_name(tracking: TrackingSettings) -> str:
    """The address of the store, its password left out."""
    return CREDENTIALS.sub("://***@", tracking_uri(tracking))
