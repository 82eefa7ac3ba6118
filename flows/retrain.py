"""The scheduled flow: fine-tune again when the rows have changed, and keep the better model.

Run it as `tunesmith retrain CONFIG.yaml`, or again and again by `tunesmith schedule`.

The data source is looked at first. Where neither its contents nor the settings have changed since the
last retraining that was finished, the flow ends at once and says so. Otherwise a finetune is run; its
evaluation and that of @champion are compared on the same test rows, and @champion moves or stays.

Annotations here are real types, not text: Prefect (3.8.8) cannot resolve the text when a served
schedule loads the flow.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefect.runtime.flow_run
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.finetune import finetune, given_settings, run_name
from flows.flow_run import begin_flow_run, close_mlflow_runs
from flows.notify import notify
from tasks.config import Settings, flatten
from tasks.errors import InputError
from tasks.prepare.sources import check_source, source_inputs
from tasks.publish import fingerprint
from tasks.tracking import StoredRun, newest_run_with, reopened

log = logging.getLogger(__name__)

PLAN = "tunesmith.retrain"
"""Tag of a finished retraining: what it was made from."""

ROWS = "tunesmith.retrain_rows"
"""Tag of a finished retraining: its rows alone."""

LAST_LOOK = "tunesmith.retrain_unchanged"
"""Tag of the newest retraining: when it was looked again, and nothing had changed."""

ARTIFACT = "retrain"
"""Under this key Prefect's UI keeps what came of every retraining."""

NO_PART = ("name", "search.", "tracking.", "flow.")
"""Settings, or their beginnings, whose change is no reason to train again."""


@dataclass(frozen=True)
class Retrained:
    """What came of a look at the data.

    Attributes:
        run_id: the MLflow run that was made, or the earlier one that still stands.
        trained: whether there was a reason to train.
        promoted: whether its model is @champion now; None when nothing was trained.
        reason: of all this, in a sentence.
        report: the page of the run that was made.
    """

    run_id: str
    trained: bool
    promoted: bool | None
    reason: str
    report: Path | None = None


@flow(
    name="retrain",
    flow_run_name=lambda: f"retrain {Path(given_settings().data.source).stem} {_due()}",
    on_completion=[notify],
    on_failure=[close_mlflow_runs, notify],
    on_crashed=[close_mlflow_runs, notify],
    on_cancellation=[close_mlflow_runs, notify],
)
def retrain(settings: Settings) -> Retrained:
    """Fine-tune if the rows have changed, and promote what is better than the champion."""
    begin_flow_run(settings)
    check_registry(settings)
    rows = rows_fingerprint(settings)
    plan = fingerprint([rows, plan_of(settings)])
    if last := newest_run_with(settings.tracking, {PLAN: plan}):
        done = _unchanged(settings, last)
    else:
        known = newest_run_with(settings.tracking, {ROWS: rows})
        log.info("retrain: %s", "the settings have changed" if known else "the rows are new")
        done = _changed(settings, {PLAN: plan, ROWS: rows})
    log.info("retrain: %s", done.reason)
    _tell(done)
    # Prefect shows the message beside the state of the run.
    return Completed(message=done.reason, data=done)  # type: ignore[return-value]


def check_registry(settings: Settings) -> None:
    """Refuse settings under which no model could ever be promoted.

    Raises:
        InputError: the registry is switched off.
    """
    if not settings.register_.enabled:
        raise InputError(
            "register.enabled = false: retraining keeps the better model through the registry; set it to true"
        )


def rows_fingerprint(settings: Settings) -> str:
    """What the rows are: contents, not places or times."""
    check_source(settings.data)
    return fingerprint(source_inputs(settings.data))


def plan_of(settings: Settings) -> dict[str, Any]:
    """The settings whose change is a reason to train again; a base model by the name it is given."""
    flat = flatten(settings)
    return {key: value for key, value in flat.items() if not key.startswith((*NO_PART, "data.source"))}


def _unchanged(settings: Settings, last: StoredRun) -> Retrained:
    """Say that there is nothing to do, in the run that has done it too."""
    with reopened(settings.tracking, last.id) as run:
        run.set_tags({LAST_LOOK: time.strftime("%Y-%m-%d %H:%M:%S")})
    since = f"since run {last.name} ({last.id[:8]})"
    return Retrained(last.id, False, None, f"rows and settings are unchanged {since}: nothing to do")


def _changed(settings: Settings, tags: dict[str, str]) -> Retrained:
    named = settings.model_copy(update={"name": f"{run_name(settings)} {time.strftime('%Y-%m-%d %H:%M')}"})
    outcome = finetune(named)
    finished, told = outcome.finished, outcome.finished.registration
    assert told is not None, "the registry is not switched off"
    # Only now: what failed half way is tried again the next time.
    finished.run.set_tags({**tags, "tunesmith.retrain_reason": told.reason})
    what = f"{told.name} version {told.version}"
    verdict = f"{what} is @champion" if told.champion else f"@champion stays, {what} is @challenger"
    return Retrained(finished.run.id, True, told.champion, f"{verdict}: {told.reason}", outcome.report)


def _due() -> str:
    """When this flow run was to start, in local time; a schedule gets its runs ready some seconds before."""
    return f"{prefect.runtime.flow_run.get_scheduled_start_time().astimezone():%Y-%m-%d %H:%M}"


def _tell(done: Retrained) -> None:
    """Keep what came of it as an artifact of this flow run; a run is not lost for want of it."""
    if prefect.runtime.flow_run.get_id() is None:
        return
    verdict = {None: "nothing to do", True: "promoted", False: "kept the champion"}[done.promoted]
    try:
        create_markdown_artifact(
            f"**{verdict}**: {done.reason}\n\nMLflow run `{done.run_id}`", ARTIFACT, "what came of it"
        )
    except Exception as error:
        log.warning("retrain: the verdict is not in Prefect: %s: %s", type(error).__name__, error)
