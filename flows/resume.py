"""Going on with a finetune that ended early: its settings are kept in its MLflow run, and found there."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.find_run import matching_runs, no_run, the_one
from tasks.config import CREDENTIALS, PATHS, Settings, TrackingSettings, load_settings
from tasks.errors import InputError
from tasks.tracking import StoredRun, read_text

SETTINGS_FILE = "settings.yaml"
"""The artifact of a run with all its settings."""


@dataclass(frozen=True)
class Interrupted:
    """A run to go on with."""

    run_id: str
    settings: Settings


def settings_as_yaml(settings: Settings) -> str:
    """All settings, as `load_settings` reads them from anywhere: paths are absolute.

    User and password in an address become `***`.
    """
    tree = settings.model_dump(mode="json", by_alias=True)
    defaults = Settings().model_dump(mode="json", by_alias=True)
    for section, key in PATHS:
        source = tree[section][key]
        if source != defaults[section][key] and (path := Path(source).expanduser()).exists():
            tree[section][key] = str(path.resolve())
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return CREDENTIALS.sub("://***@", text)


def find_interrupted(reference: str) -> Interrupted:
    """The run that `reference` means, an id, the beginning of one, or a name, with its settings.

    Raises:
        InputError: there is no such run, there are several, it is finished or still running, or it is no
            finetune.
    """
    tracking = TrackingSettings()
    run = _chosen(reference, tracking)
    settings = settings_of(tracking, run.id)
    if settings is None:
        raise InputError(f"run {run.id} ({run.name}) has no {SETTINGS_FILE}: only a finetune can be resumed")
    # The store is where the run was found: an address kept in the run has lost its password.
    found = settings.tracking.model_copy(update={"uri": tracking.uri})
    return Interrupted(run.id, settings.model_copy(update={"tracking": found}))


def settings_of(tracking: TrackingSettings, run_id: str, overrides: Sequence[str] = ()) -> Settings | None:
    """The settings a run keeps, with overrides laid over them; None when it keeps none."""
    text = read_text(tracking, run_id, SETTINGS_FILE)
    if text is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SETTINGS_FILE
        path.write_text(text, encoding="utf-8")
        return load_settings(path, overrides)


def _chosen(reference: str, tracking: TrackingSettings) -> StoredRun:
    """The one run meant; of those that share a name, the one that is not finished."""
    meant = matching_runs(reference, tracking)
    if not meant:
        raise InputError(no_run(reference, tracking))
    unfinished = [run for run in meant if run.status != "FINISHED"]
    if not unfinished:
        raise InputError(
            f"run {meant[0].id} ({meant[0].name}) is finished: there is nothing left to resume; "
            "'tunesmith finetune' starts another"
        )
    run = the_one(reference, unfinished)
    if run.status == "RUNNING":
        _check_dead(run)
    return run


def _check_dead(run: StoredRun) -> None:
    """A run killed with -9 stays RUNNING in MLflow; only its process tells it from one that is at work."""
    import psutil

    host, pid, started = run.process.rsplit(" ", 2) if run.process else ("", "0", "0")
    if host and host != platform.node():
        raise InputError(f"run {run.id} ({run.name}) is running on {host}; stop it and resume it there")
    try:
        alive = abs(psutil.Process(int(pid)).create_time() - float(started)) < 1
    except psutil.NoSuchProcess:
        alive = False
    if alive:
        raise InputError(f"run {run.id} ({run.name}) is still running, in process {pid}; stop that first")
