"""A signal to stop takes effect after the update under way, with a checkpoint; a second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from test_train_checkpoints import assert_equal_runs, settings_of
from test_train_checkpoints import train as train_with_checkpoints
from test_train_loop import tiny_network

from tasks.prepare.splits import TokenRows
from tasks.train import loop
from tasks.train.batches import Batch
from tasks.train.checkpoints import Checkpoints
from tasks.train.interrupt import PutOffSignals
from tasks.train.loop import fit
from tasks.train.update import Updates


def exit_with(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of the command line, whatever the tests were started under; put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, exit_with)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_the_middle_of_a_step_lets_it_finish_and_saves_it(
    number: signal.Signals,
    error: type[BaseException],
    token_rows: TokenRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(steps_per_save=None)
    plain = Updates.gradient
    saved = Checkpoints(tmp_path / "run", settings)

    def interrupted(updates: Updates, batches: Sequence[Batch], step: int) -> object:
        if step == 6:
            os.kill(os.getpid(), number)
        return plain(updates, batches, step)

    monkeypatch.setattr(Updates, "gradient", interrupted)
    with pytest.raises(error):
        fit(tiny_network(settings), token_rows, token_rows, settings, lambda *_: None, saved)
    found = saved.newest()
    assert found is not None
    assert found.training.step == 6
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        exit_with,
    )


def test_a_signal_during_validation_cuts_it_short_and_it_is_made_up_for(
    token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(max_steps=8, steps_per_eval=4)
    plain, validations = loop.mean_loss, []

    def interrupted(*given: object) -> float:
        validations.append(given)
        if len(validations) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given)  # type: ignore[arg-type]

    straight, _ = train_with_checkpoints(tmp_path / "straight", token_rows, settings)
    monkeypatch.setattr(loop, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_with_checkpoints(tmp_path / "run", token_rows, settings)
    found = Checkpoints(tmp_path / "run", settings).newest()
    assert found is not None
    assert (found.training.step, found.training.validated) == (4, False)
    resumed, _ = train_with_checkpoints(tmp_path / "run", token_rows, settings)
    assert_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "run", 8)


def test_a_second_signal_acts_at_once() -> None:
    reached = []

    def work() -> None:
        with PutOffSignals():
            signal.raise_signal(signal.SIGINT)
            reached.append("after the first")
            signal.raise_signal(signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["after the first"]


def test_a_signal_that_comes_too_late_for_the_loop_is_not_swallowed() -> None:
    with pytest.raises(SystemExit, match="143"), PutOffSignals():
        signal.raise_signal(signal.SIGTERM)


def test_an_error_in_the_block_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        with PutOffSignals():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("faulty")

    with pytest.raises(ValueError, match="faulty"):
        work()


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with PutOffSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_main_thread_no_handler_is_touched() -> None:
    seen: list[object] = []

    def work() -> None:
        with PutOffSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [exit_with]


def test_whoever_handles_the_signal_may_go_on(token_rows: TokenRows) -> None:
    settings = settings_of(max_steps=4, steps_per_eval=2)
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))

    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 2 and "train_loss" in metrics:
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(tiny_network(settings), token_rows, token_rows, settings, interrupt)
    assert heard == [signal.SIGINT]
    assert [step for step, metrics in result.history if "val_loss" in metrics] == [0, 2, 4]
