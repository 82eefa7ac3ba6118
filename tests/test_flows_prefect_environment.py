"""Prefect in a command a person watches: nothing on the screen, everything in its own log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.prefect_environment import OURS
from tasks.home import CHECKOUT

PROGRAM = """
import logging, sys
from flows.prefect_environment import prepare_prefect, wake_server
prepare_prefect(quiet=sys.argv[1] == "quiet")
from prefect import flow, task
from tasks.errors import StepError
fault = StepError("no such row")

@task
def step() -> None:
    logging.getLogger("tasks.step").info("from a plain module")
    raise fault

@flow
def failing() -> None:
    step()

logging.getLogger("tasks.step").info("outside of a flow")
assert wake_server().startswith("http://127.0.0.1")
try:
    failing()
except StepError as error:
    assert error is fault
    print("unchanged")
"""


@pytest.mark.usefixtures("prefect_harness")
def test_a_quiet_flow_prints_nothing_passes_its_exception_on_and_logs_to_prefect() -> None:
    done = run("quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "unchanged\n", "")
    messages = logged()
    assert "from a plain module" in messages
    assert any("StepError('no such row')" in message for message in messages)
    assert "outside of a flow" not in messages


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_that_is_not_quiet_shows_its_log() -> None:
    assert "from a plain module" in run("loud").stderr


def test_a_persons_own_prefect_settings_win(tmp_path: Path) -> None:
    given = {"PREFECT_LOGGING_EXTRA_LOGGERS": "mine", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"}
    program = (
        "import os; from flows.prefect_environment import prepare_prefect; prepare_prefect(quiet=True);"
        "print(os.environ['PREFECT_LOGGING_EXTRA_LOGGERS'], "
        "os.environ['PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(given), capture_output=True, text=True
    )
    assert done.stdout == "mine INFO\n"
    assert OURS == ("tasks", "flows", "search")


def run(how: str) -> subprocess.CompletedProcess[str]:
    from prefect.settings import get_current_settings

    given = {"PREFECT_API_URL": str(get_current_settings().api.url)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment(given), capture_output=True, text=True
    )


def environment(given: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    return {**kept, "PYTHONPATH": str(CHECKOUT), **given}


def logged() -> list[str]:
    """The latest log lines of the server, which other tests have written to before."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import LogSort

    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            messages = [entry.message for entry in client.read_logs(sort=LogSort.TIMESTAMP_DESC)]
            if any("StepError('no such row')" in message for message in messages):
                break
            time.sleep(0.2)
    return messages
