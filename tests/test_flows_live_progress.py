"""How far a step is stands in Prefect while it runs, and the step never waits for Prefect."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from prefect import flow
from prefect.artifacts import Artifact

from flows import live_progress as module
from flows.live_progress import live_progress
from tasks.progress import progress


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "WORTH_SHOWING_S", 0.02)
    monkeypatch.setattr(module, "SEND_EVERY_S", 0.02)
    return


def wait_for_artifact(key: str, data: float) -> Artifact:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (found := Artifact.get(key)) is not None and found.data == data:
            return found  # type: ignore[return-value]
        time.sleep(0.05)
    raise AssertionError(f"no artifact '{key}' of {data}: {Artifact.get(key)}")


@flow(name="watched")
def watched() -> None:
    with live_progress(), progress("Test loss, base", total=4) as bar:
        bar.advance(1, "loss 2.31")
        half = wait_for_artifact("test-loss-base", 25.0)
        assert half.description == "Test loss, base: 1 of 4, loss 2.31"
        assert half.flow_run_id is not None
        bar.advance(3)


@pytest.mark.usefixtures("prefect_harness")
def test_a_wait_is_a_progress_artifact_of_its_run_until_it_is_over() -> None:
    watched()
    wait_for_artifact("test-loss-base", 100.0)


def test_a_server_that_does_not_answer_keeps_no_step_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        release.wait(60)

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", hang)
    with live_progress(), progress("training", total=2) as bar:
        assert asked.wait(60)
        bar.advance(2)
    assert not release.is_set(), "the block ended while the server hung"
    release.set()


def test_a_wait_of_unknown_or_no_length_leaves_no_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Sent, "start", lambda _: pytest.fail("it was sent"))
    with live_progress():
        for total in (None, 0):
            with progress("reading", total) as bar:
                bar.advance(3)


def test_after_the_block_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_progress():
        pass
    monkeypatch.setattr(module._Sent, "start", lambda _: pytest.fail("it was sent"))
    with progress("training", total=2):
        pass
