"""Who is told when a run ends: a command of a person's own, or an address that is posted to.

Both are given the same record as JSON, the command on its standard input (and the main parts of it in
`TUNESMITH_…` variables). The address is read from an environment variable: it often holds a token, and
settings are shown and logged. Telling never makes a run fail.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tasks.config import FlowSettings, Settings

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S, WEBHOOK_TIMEOUT_S = 60.0, 10.0

EVENTS = {"COMPLETED": "success", "FAILED": "failure", "CRASHED": "failure", "CANCELLED": "failure"}
"""By Prefect's type of a state."""


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: tell of a flow run that has ended; one within another is told of by that one."""
    if flow_run.parent_task_run_id is not None:
        return
    given: Any = flow_run.parameters.get("settings", {})
    settings = (given if isinstance(given, Settings) else Settings.model_validate(given)).flow
    record = {
        "event": EVENTS.get(state.type.value, "failure"),
        "flow": flow.name,
        "run": flow_run.name,
        "state": state.name or "",
        "message": state.message or "",
        "prefect_flow_run_id": str(flow_run.id),
    }
    tell(settings, record)


def tell(settings: FlowSettings, record: dict[str, str]) -> None:
    """Run the command and post to the address, as far as they are set and want this event."""
    if settings.notify_on not in ("both", record["event"]):
        return
    if settings.notify_command:
        _run(settings.notify_command, record)
    if address := os.environ.get(settings.notify_webhook_env):
        _post(address, settings.notify_webhook_env, record)


def _run(command: str, record: dict[str, str]) -> None:
    variables = {f"TUNESMITH_{name.upper()}": value for name, value in record.items()}
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=json.dumps(record),
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        log.warning("flow.notify_command failed: %s", error)
        return
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-300:]
        log.warning("flow.notify_command ended with code %d: %s", done.returncode, said)


def _post(address: str, variable: str, record: dict[str, str]) -> None:
    import httpx

    try:
        # "text" is what Slack, Mattermost and their like show.
        text = f"{record['flow']} {record['run']}: {record['event']}. {record['message']}"
        httpx.post(address, json={"text": text, **record}, timeout=WEBHOOK_TIMEOUT_S).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # Its text may hold the address.
        log.warning("the address in %s was not told: %s", variable, type(error).__name__)
