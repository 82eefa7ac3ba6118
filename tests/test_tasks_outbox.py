"""The outbox: reporting never waits, nothing is lost or doubled, whatever the store or a kill does."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tasks import outbox as module
from tasks.home import CHECKOUT
from tasks.outbox import (
    BATCH_POINTS,
    Ending,
    Outbox,
    Point,
    RefusedError,
    leftovers,
    open_outbox,
    take_over,
)

ENDING = Ending("FINISHED", 7, "here 1 2.0")
PATIENCE_S = 60.0


class Shelf:
    """A store in memory that can be down, slow, or refuse; keeps equal points once, as MLflow does."""

    def __init__(self, address: str = "shelf://one") -> None:
        self.address = address
        self.fault: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.stored: dict[Point, None] = {}
        self.received: list[int] = []
        self.ended: list[tuple[str, Ending, int]] = []

    def take_points(self, run_id: str, points: Sequence[Point]) -> None:
        self.open.wait()
        if self.fault:
            raise self.fault
        self.received.append(len(points))
        self.stored.update(dict.fromkeys(points))

    def take_ending(self, run_id: str, ending: Ending) -> None:
        self.open.wait()
        if self.fault:
            raise self.fault
        self.ended.append((run_id, ending, len(self.stored)))

    def points(self, name: str = "loss") -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.stored if point.name == name]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.fault = None
    shelf.open.set()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_EVERY_S", 0.01)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "HURRIED_PAUSE_S", 0.01)


def until(true: Callable[[], object]) -> None:
    """Wait for another thread, far longer than it can need."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def abandon(folder: Path, lines: Sequence[str], name: str = "run") -> Path:
    """The outbox of a dead process with these lines after its head."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text('{"run": "run", "store": "shelf://one"}\n' + "".join(lines))
    return path


def line(step: int) -> str:
    return json.dumps({"time_ms": 1000 + step, "step": step, "metrics": {"loss": float(step)}}) + "\n"


def replay(folder: Path, shelf: Shelf) -> None:
    [left] = leftovers(folder)
    outbox = take_over(left, shelf)
    assert outbox
    assert outbox.close(PATIENCE_S)


def test_points_arrive_in_order_with_the_time_of_their_report_and_the_file_is_gone(
    tmp_path: Path, shelf: Shelf
) -> None:
    before = int(time.time() * 1000)
    outbox = open_outbox(tmp_path, "run", shelf)
    for step in range(3):
        outbox.report(step, {"loss": 1 / (step + 1), "rate": 0.5})
    after = int(time.time() * 1000)
    shelf.open.clear()
    outbox.end(ENDING)
    shelf.open.set()
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert shelf.points("rate") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert all(before <= point.time_ms <= after for point in shelf.stored)
    assert shelf.ended == [("run", ENDING, 6)], "after all points"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_report_does_not_wait_for_a_store_that_hangs(tmp_path: Path, shelf: Shelf) -> None:
    shelf.open.clear()
    outbox = open_outbox(tmp_path, "run", shelf)
    for step in range(3000):
        outbox.report(step, {"loss": float(step)})
    assert not shelf.stored, "the store has hung all the time"
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 3001
    shelf.open.set()
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == [(step, float(step)) for step in range(3000)]
    assert max(shelf.received) <= BATCH_POINTS
    assert len(shelf.received) <= 5, "together, not one by one"


def test_an_outage_is_said_once_and_its_end_once_and_loses_nothing(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tasks.outbox")
    tries: list[int] = []
    plain = shelf.take_points

    def counted(run_id: str, points: Sequence[Point]) -> None:
        tries.append(len(points))
        plain(run_id, points)

    shelf.take_points = counted  # type: ignore[method-assign]
    outbox = open_outbox(tmp_path, "run", shelf)
    for outage in (1, 2):
        shelf.fault = ConnectionError("it does not answer")
        tries.clear()
        outbox.report(outage, {"loss": float(outage)})
        until(lambda: len(tries) > 3)
        shelf.fault = None
        assert outbox.flush(PATIENCE_S)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2 * outage
        assert "shelf://one cannot be written to (it does not answer): training goes on" in messages[-2]
        assert str(outbox.path) in messages[-2]
        assert messages[-1] == "MLflow at shelf://one takes points again"
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == [(1, 1.0), (2, 2.0)]


def test_pauses_grow_while_the_store_is_down(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(Outbox, "_pause", lambda _, pause_s: (pauses.append(pause_s), time.sleep(0.001)))
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.08)
    shelf.fault = ConnectionError("down")
    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.report(1, {"loss": 1.0})
    until(lambda: len(pauses) >= 6)
    shelf.fault = None
    assert outbox.close(PATIENCE_S)
    assert pauses[:6] == [0.01, 0.02, 0.04, 0.08, 0.08, 0.08]


def test_closing_gives_up_in_time_says_where_the_rest_is_and_goes_on_in_the_background(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.open.clear()
    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.report(1, {"loss": 1.0})
    assert not outbox.close(0.05)
    [record] = caplog.records
    assert f"the rest waits in {outbox.path}" in record.getMessage()
    assert leftovers(tmp_path) == [], "this process holds it still"
    shelf.open.set()
    until(lambda: not outbox.path.exists())
    assert shelf.points() == [(1, 1.0)]


def test_a_process_ends_although_its_store_hangs_and_the_next_one_sends(tmp_path: Path, shelf: Shelf) -> None:
    program = (
        "import sys, threading; from pathlib import Path; from tasks.outbox import *\n"
        "class Hangs:\n"
        "    address = 'shelf://one'\n"
        "    def take_points(self, *_): threading.Event().wait()\n"
        "outbox = open_outbox(Path(sys.argv[1]), 'run', Hangs())\n"
        "outbox.report(1, {'loss': 1.0}); outbox.close(0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=CHECKOUT, timeout=PATIENCE_S)
    assert done.returncode == 0
    replay(tmp_path, shelf)
    assert shelf.points() == [(1, 1.0)]


def test_a_metric_that_has_the_step_already_is_left_out(tmp_path: Path, shelf: Shelf) -> None:
    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.know([("loss", 1)])
    outbox.report(1, {"loss": 5.0, "rate": 0.1})
    outbox.report(2, {"loss": 2.0})
    outbox.flush(PATIENCE_S)
    outbox.report(2, {"loss": 3.0})
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == [(2, 2.0)]
    assert shelf.points("rate") == [(1, 0.1)]


def test_figures_are_plain_floats_before_another_thread_sees_them(tmp_path: Path, shelf: Shelf) -> None:
    import mlx.core as mx

    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.report(1, {"mlx": mx.array(0.5), "numpy": np.float32(0.25), "none": math.nan, "over": math.inf})  # type: ignore[dict-item]
    assert outbox.close(PATIENCE_S)
    values = {point.name: point.value for point in shelf.stored}
    assert {type(value) for value in values.values()} == {float}
    assert (values["mlx"], values["numpy"], values["over"]) == (0.5, 0.25, math.inf)
    assert math.isnan(values["none"])


def test_values_read_back_from_the_file_are_those_that_were_reported(tmp_path: Path, shelf: Shelf) -> None:
    values = [random.Random(5).uniform(-9, 9) * 10.0**power for power in range(-300, 300, 7)]
    shelf.fault = ConnectionError("down")
    outbox = open_outbox(tmp_path, "run", shelf)
    for step, value in enumerate([*values, math.inf]):
        outbox.report(step, {"loss": value})
    other = Shelf()
    again = Outbox(_copy(outbox.path, tmp_path / "copy"), outbox._lock, "run", other)
    assert again.flush(PATIENCE_S)
    assert other.points() == list(enumerate([*values, math.inf]))


def _copy(path: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    return folder / path.name


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_torn_last_line_is_cut_off_and_spoils_no_later_line(tmp_path: Path, shelf: Shelf, cut: int) -> None:
    path = abandon(tmp_path, [line(1), line(2), line(3)[:-cut]])
    outbox = open_outbox(tmp_path, "run", shelf)
    assert outbox.path == path
    outbox.report(2, {"loss": 20.0})
    outbox.report(3, {"loss": 30.0})
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_damaged_lines_are_passed_over_and_counted(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    bad = ["\0\0\0\n", "[1]\n", '{"metrics": 3}\n', "7\n"]
    abandon(tmp_path, [line(1), *bad, line(2)])
    replay(tmp_path, shelf)
    assert shelf.points() == [(1, 1.0), (2, 2.0)]
    assert "4 damaged lines" in caplog.text


def test_what_is_marked_as_sent_is_not_sent_again_and_without_marks_all_is(
    tmp_path: Path, shelf: Shelf
) -> None:
    path = abandon(tmp_path, [line(1), line(2)])
    marked = path.stat().st_size
    path.write_text(path.read_text() + line(3) + json.dumps({"sent": marked}) + "\n" + line(4))
    unmarked = "".join(each for each in path.open() if "sent" not in each)
    replay(tmp_path, shelf)
    assert shelf.points() == [(3, 3.0), (4, 4.0)]
    path.write_text(unmarked)
    replay(tmp_path, shelf)
    assert sorted(shelf.points()) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_running_outbox_marks_what_the_store_has(tmp_path: Path, shelf: Shelf) -> None:
    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.report(1, {"loss": 1.0})
    assert outbox.flush(PATIENCE_S)
    *before, mark = outbox.path.read_text().splitlines(keepends=True)
    assert json.loads(mark) == {"sent": sum(map(len, before))}
    other = Shelf()
    Outbox(_copy(outbox.path, tmp_path / "copy"), outbox._lock, "run", other).flush(PATIENCE_S)
    assert not other.stored
    assert outbox.close(PATIENCE_S)


def test_the_status_left_by_a_dead_process_is_sent_after_its_points(tmp_path: Path, shelf: Shelf) -> None:
    ending = {"status": "FAILED", "time_ms": 5, "process": "here 1 2.0", "error": "é"}
    abandon(tmp_path, [line(1), json.dumps(ending) + "\n"])
    replay(tmp_path, shelf)
    assert shelf.ended == [("run", Ending("FAILED", 5, "here 1 2.0", "é"), 1)]


def test_the_outbox_of_a_living_process_is_left_to_it_and_a_second_file_opened(
    tmp_path: Path, shelf: Shelf
) -> None:
    program = (
        "import sys; from pathlib import Path; from test_tasks_outbox import *\n"
        "shelf = Shelf(); shelf.fault = ConnectionError('down')\n"
        "outbox = open_outbox(Path(sys.argv[1]), 'run', shelf); outbox.report(1, {'loss': 1.0})\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with python(program, str(tmp_path)) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        assert leftovers(tmp_path) == []
        assert take_over(module.Leftover(tmp_path / "run.jsonl", "run", "shelf://one"), shelf) is None
        second = open_outbox(tmp_path, "run", shelf)
        assert second.path.name == "run.2.jsonl"
        second.report(2, {"loss": 2.0})
        assert second.close(PATIENCE_S)
        holder.kill()
    replay(tmp_path, shelf)
    assert sorted(shelf.points()) == [(1, 1.0), (2, 2.0)]


def python(program: str, *given: str) -> subprocess.Popen[bytes]:
    """A child that finds these tests and the packages."""
    places = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", program, *given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": places},
    )


def test_what_a_store_refuses_is_set_aside_once_and_training_goes_on(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.fault = RefusedError("run 'run' not found")
    outbox = open_outbox(tmp_path, "run", shelf)
    outbox.report(1, {"loss": 1.0})
    until(lambda: list(tmp_path.glob("*.refused")))
    shelf.fault = None
    outbox.report(2, {"loss": 2.0})
    assert outbox.close(PATIENCE_S)
    [aside] = tmp_path.glob("*.refused")
    assert [json.loads(each).get("step") for each in aside.open()] == [None, 1, 2]
    assert not shelf.stored
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"refuses the points of run run (run 'run' not found): they stay in {aside}" in caplog.text
    assert leftovers(tmp_path) == []


def test_a_full_disk_stops_neither_training_nor_sending(
    tmp_path: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        """A file that takes three more bytes."""

        room = 3

        def write(self, data: bytearray) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = self.room, 0
            return plain.write(data[:taken]) or 0

    outbox = open_outbox(tmp_path, "run", shelf)
    shelf.open.clear()
    outbox.report(1, {"loss": 1.0})
    plain = outbox._file
    outbox._file = Full()  # type: ignore[assignment]
    for step in (2, 3):
        outbox.report(step, {"loss": float(step)})
    assert caplog.text.count("cannot be written to ([Errno 28]") == 1
    outbox._file = plain
    outbox.report(4, {"loss": 4.0})
    other = Shelf()
    Outbox(_copy(outbox.path, tmp_path / "copy"), outbox._lock, "run", other).flush(PATIENCE_S)
    assert other.points() == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)], "room again: all lines are whole"
    shelf.open.set()
    assert outbox.close(PATIENCE_S)
    assert shelf.points() == other.points()


def test_closing_one_outbox_leaves_the_others_open(tmp_path: Path, shelf: Shelf) -> None:
    parent, trial = (open_outbox(tmp_path, name, shelf) for name in ("parent", "trial"))
    trial.report(1, {"trial": 1.0})
    assert trial.close(PATIENCE_S)
    parent.report(1, {"parent": 1.0})
    assert parent.close(PATIENCE_S)
    assert {point.name for point in shelf.stored} == {"trial", "parent"}


def test_reports_of_many_threads_all_arrive(tmp_path: Path, shelf: Shelf) -> None:
    outbox = open_outbox(tmp_path, "run", shelf)

    def work(name: str) -> None:
        for step in range(200):
            outbox.report(step, {name: float(step)})

    threads = [threading.Thread(target=work, args=(f"m{number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outbox.close(PATIENCE_S)
    assert len(shelf.stored) == 1000


REPORTING = """
import sys
from pathlib import Path
from tasks import outbox as module
from tasks.outbox import open_outbox

module.SEND_EVERY_S = module.FIRST_PAUSE_S = 0.001

class Disk:
    '''Stores in a file what it is sent; answers every other time.'''
    address, calls = 'shelf://one', 0

    def take_points(self, run_id, points):
        with open(sys.argv[2], 'a') as file:
            for each in points:
                file.write(f'{each.time_ms} {each.step} {each.name} {each.value!r}\\n')
        self.calls += 1
        if self.calls % 2:
            raise ConnectionError('stored it, but the answer was lost')

outbox = open_outbox(Path(sys.argv[1]), 'run', Disk())
begin = int(sys.argv[3])
for step in range(begin, begin + 100_000):
    outbox.report(step, {'loss': step / 3, 'rate': 0.5})
    print(step, flush=True)
"""


def test_after_kill_9_at_any_moment_every_reported_point_is_stored_exactly_once(tmp_path: Path) -> None:
    stored, folder = tmp_path / "stored.txt", tmp_path / "outbox"
    moments = random.Random(9)
    acknowledged: list[int] = []
    for life in range(8):
        with python(REPORTING, str(folder), str(stored), str(life * 1_000_000)) as writer:
            assert writer.stdout
            acknowledged.append(int(writer.stdout.readline()))
            time.sleep(moments.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            acknowledged += [int(each) for each in writer.stdout.read().split(b"\n")[:-1]]
        # Each second life begins in the outbox that the one before has left.
        if life % 2:
            shelf = Shelf()
            replay(folder, shelf)
            with stored.open("a") as file:
                file.writelines(f"{p.time_ms} {p.step} {p.name} {p.value!r}\n" for p in shelf.stored)
    assert len(acknowledged) > 8
    points = [tuple(each.split()[1:]) for each in set(stored.read_text().splitlines())]
    assert len(points) == len(set(points)), "a point sent twice has the same time, and is stored once"
    assert {(str(step), "loss", repr(step / 3)) for step in acknowledged} <= set(points)
    assert {(str(step), "rate", "0.5") for step in acknowledged} <= set(points)
