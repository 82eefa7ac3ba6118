"""The machine is one training's at a time; who comes second waits or is refused, and a crash frees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks import machine
from tasks.errors import StepError
from tasks.home import CHECKOUT
from tasks.machine import machine_turn

HOLD = """
import sys, time
from pathlib import Path
from tasks.machine import machine_turn
with machine_turn("run nightly", "refuse"):
    Path(sys.argv[1]).touch()
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the machine."""
    sign = tmp_path / "holds"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(sign)], cwd=CHECKOUT)
    deadline = time.monotonic() + 60
    while not sign.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert sign.exists()
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_by_the_name_of_the_first(other: subprocess.Popen[bytes]) -> None:
    with (
        pytest.raises(StepError, match=rf"run nightly \(process {other.pid}, since .*flow\.when_busy"),
        machine_turn("mine", "refuse"),
    ):
        pytest.fail("both have it")


def test_a_second_training_waits_until_the_first_has_crashed(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "LOOK_EVERY_S", 0.05)
    plain: Callable[..., object] = machine.progress

    def crash(title: str) -> object:
        assert "waiting for run nightly" in title
        other.send_signal(signal.SIGKILL)
        return plain(title)

    monkeypatch.setattr(machine, "progress", crash)
    with machine_turn("mine", "wait"):
        assert f"mine (process {os.getpid()}" in machine.holder()
    assert "waiting for it" in caplog.text


def test_a_machine_may_be_shared(other: subprocess.Popen[bytes]) -> None:
    with machine_turn("mine", "share"):
        assert other.poll() is None


def test_a_flow_within_a_flow_keeps_the_turn() -> None:
    with machine_turn("outer", "refuse"):
        with machine_turn("inner", "refuse"):
            assert machine.holder().startswith("outer")
        done = subprocess.run([sys.executable, "-c", HOLD, "unused"], cwd=CHECKOUT, capture_output=True)
        assert b"outer" in done.stderr, "the inner block does not give it away"


def test_after_a_failure_the_next_has_its_turn() -> None:
    with pytest.raises(ZeroDivisionError), machine_turn("mine", "refuse"):
        raise ZeroDivisionError
    with machine_turn("mine again", "refuse"):
        assert machine.holder().startswith("mine again")
