"""What may heal is tried again, ever later; what cannot is not; and no step takes longer than it may."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

import httpx
import pytest
import requests
from mlflow.exceptions import MlflowException
from prefect import flow, task
from sqlalchemy.exc import OperationalError

from flows.steps import patiently
from tasks.config import FlowSettings
from tasks.errors import InputError, OutageError, StepError
from tasks.patience import LONGEST_PAUSE_S, may_heal, patience

REQUEST = httpx.Request("GET", "http://hub")


def answered(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=REQUEST, response=httpx.Response(status, request=REQUEST))


@pytest.mark.parametrize(
    "error",
    [
        OutageError("the hub cannot be reached"),
        ConnectionResetError(),
        TimeoutError("the server did not answer"),
        OSError(errno.ENETUNREACH, "no network"),
        httpx.ConnectError("refused"),
        requests.exceptions.ReadTimeout("slow"),
        requests.exceptions.ConnectionError("refused"),
        answered(503),
        answered(429),
        OperationalError("insert", {}, Exception("database is locked")),
        MlflowException("API request failed with exception: connection refused"),
        RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_outages_may_heal(error: BaseException) -> None:
    assert may_heal(error)
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = error
    assert may_heal(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        InputError("row 7 is bad"),
        StepError("step 7: loss nan"),
        StepError("12.1 GB needed, the budget is 8 GB"),
        OSError(errno.ENOSPC, "the disk is full"),
        FileNotFoundError("rows.jsonl"),
        PermissionError("rows.jsonl"),
        MemoryError(),
        ValueError("a fault of the program"),
        KeyError("loss"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
        answered(404),
        answered(401),
        MlflowException("param changed", error_code=3),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_comes_back_the_next_time_is_not_tried_again(error: BaseException) -> None:
    assert not may_heal(error)


def test_what_a_person_has_to_mend_stays_so_whatever_it_came_from() -> None:
    error = InputError("no such model")
    error.__cause__ = ConnectionError()
    assert not may_heal(error)


def test_pauses_double_up_to_a_limit() -> None:
    options = patience(FlowSettings(retries=7, retry_pause_s=10))
    assert options["retry_delay_seconds"] == [10, 20, 40, 80, 160, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert options["timeout_seconds"] is None


class Fails:
    """A step that fails with one error, so many times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


def run(step: Callable[[], str], settings: FlowSettings) -> str:
    @flow
    def alone() -> str:
        return patiently(settings)(task(lambda: step(), name="train"))()

    return alone()


@pytest.mark.usefixtures("prefect_harness")
def test_a_step_is_tried_again_as_often_as_the_settings_say_and_no_more() -> None:
    settings = FlowSettings(retries=2, retry_pause_s=0)
    healing = Fails(ConnectionError("refused"), 2)
    assert run(healing, settings) == "done"
    assert healing.calls == 3
    lasting = Fails(ConnectionError("refused"), 9)
    with pytest.raises(ConnectionError):
        run(lasting, settings)
    assert lasting.calls == 3
    never = Fails(StepError("loss nan"), 9)
    with pytest.raises(StepError):
        run(never, settings)
    assert never.calls == 1
    once = Fails(ConnectionError("refused"), 9)
    with pytest.raises(ConnectionError):
        run(once, FlowSettings(retries=0))
    assert once.calls == 1


@pytest.mark.usefixtures("prefect_harness")
def test_a_step_that_takes_too_long_fails_once_and_names_the_setting() -> None:
    calls: list[int] = []

    def slow() -> str:
        calls.append(1)
        for _ in range(500):
            time.sleep(0.02)
        return "done"

    with pytest.raises(StepError, match=r"train took longer than flow\.step_minutes = 0\.01; raise it"):
        run(slow, FlowSettings(step_minutes=0.01, retry_pause_s=0))
    assert len(calls) == 1
