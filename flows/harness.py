"""`tunesmith harness`: base and tuned model of a run in the lm-evaluation-harness, logged to the run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.find_run import find_run
from flows.resume import SETTINGS_FILE
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.errors import InputError
from tasks.evaluate.harness import SCORES_FILE, harness_scores
from tasks.models.resolve import resolve_model
from tasks.tracking import connect, read_text, reopened

ADAPTER = "adapter"
"""The artifact folder of a run's adapter."""


@dataclass(frozen=True)
class Scores:
    """What the harness gave base and tuned model, by `task/metric`."""

    run_id: str
    base: Mapping[str, float]
    tuned: Mapping[str, float]


def run_harness(
    reference: str, tracking: TrackingSettings, tasks: Sequence[str], limit: int | None, shots: int | None
) -> Scores:
    """Score both models of a run; metrics `harness/…` and `harness/base/…` of it.

    Raises:
        InputError: there is no such run, it has no adapter, or a task is not known.
        StepError: the harness failed.
    """
    for option, value, least in (("--limit", limit, 1), ("--shots", shots, 0)):
        if value is not None and value < least:
            raise InputError(f"{option} {value}: give {least} or more")
    run = find_run(reference, tracking)
    settings = _settings(run.id, run.name, tracking)
    model = resolve_model(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        adapter = _adapter(run.id, run.name, tracking, Path(folder))
        base, tuned = (
            harness_scores(model, which, tasks, limit, shots, settings.evaluate.batch_size)
            for which in (None, adapter)
        )
    scores = Scores(run.id, base.read_json(SCORES_FILE), tuned.read_json(SCORES_FILE))
    with reopened(tracking, run.id) as opened:
        opened.report(0, {f"harness/{name}": value for name, value in scores.tuned.items()})
        opened.report(0, {f"harness/base/{name}": value for name, value in scores.base.items()})
    return scores


def _settings(run_id: str, name: str, tracking: TrackingSettings) -> Settings:
    text = read_text(tracking, run_id, SETTINGS_FILE)
    if text is None:
        raise InputError(f"run {run_id} ({name}) has no {SETTINGS_FILE}: give the run of a finetune")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SETTINGS_FILE
        path.write_text(text, encoding="utf-8")
        return load_settings(path)


def _adapter(run_id: str, name: str, tracking: TrackingSettings, folder: Path) -> Path:
    client, _, _ = connect(tracking)
    if not client.list_artifacts(run_id, ADAPTER):
        raise InputError(
            f"run {run_id} ({name}) has no adapter yet: finish it with 'tunesmith resume {run_id}'"
        )
    return Path(client.download_artifacts(run_id, ADAPTER, str(folder)))
