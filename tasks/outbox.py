"""The outbox of a run: what is reported waits in a local file until the tracking store has taken it.

    mlruns/outbox/<run id>.jsonl
        {"run": …, "store": …}                      whose file it is, and where it goes (no credentials)
        {"time_ms": …, "step": …, "metrics": {…}}   a report
        {"status": …, "time_ms": …, …}              how the run ended
        {"sent": 4711}                              the store has all of the first 4,711 bytes

Reporting appends a line and returns; a thread sends the lines in order. A line is whole, or it is cut
off when the file is opened next. One that was sent but not marked as sent goes out again, with the
time of its report, by which the store knows it: it keeps such a point once. Lines are not synced:
they outlive the process, kill -9 included, but not a power cut.

One process holds a file, by a lock beside it that the system frees when the process dies. Whoever
comes next sends what the dead one left (`leftovers`), and removes the file.
"""

from __future__ import annotations

import contextvars
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

SENDER = "outbox"
"""What the names of the sending threads begin with."""

BATCH_POINTS = 1000
"""MLflow takes so many in one call."""

SEND_EVERY_S = 1.0
"""Points are sent together: SQLite takes 200 single writes a second and 12,000 in batches."""

MANY_REPORTS = 100
"""Worth sending before that."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between tries while the store cannot be written to; each pause is twice the one before."""

HURRIED_PAUSE_S = 0.5
"""Between tries while somebody waits."""


class RefusedError(Exception):
    """The store will never take this, as when the run was deleted there."""


@dataclass(frozen=True)
class Point:
    """One figure at one step."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        process: which one says so; a run that another process has resumed since is not ended by it.
        error: why it ended early.
    """

    status: str
    time_ms: int
    process: str
    error: str | None = None


class Store(Protocol):
    """Where an outbox is emptied into, called from its thread alone.

    Both methods raise `RefusedError` for what will never be taken, and anything else for "not now".
    """

    @property
    def address(self) -> str:
        """By which the store is known, without credentials."""

    def take_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Store points; any of them may have been stored before."""

    def take_ending(self, run_id: str, ending: Ending) -> None:
        """Set the final status; it may have been set before."""


@dataclass(frozen=True)
class Report:
    """Figures at a step, as reported."""

    time_ms: int
    step: int
    metrics: Mapping[str, float]

    def points(self) -> list[Point]:
        """One a figure."""
        return [Point(name, value, self.time_ms, self.step) for name, value in self.metrics.items()]


@dataclass(frozen=True)
class Leftover:
    """An outbox whose process is dead."""

    path: Path
    run_id: str
    store: str


def open_outbox(folder: Path, run_id: str, store: Store) -> Outbox:
    """The outbox of a run, held by this process: what lies in it is sent, what is reported too.

    Another process that reports to the same run holds the first file; this one then has a second.
    """
    names = chain([f"{run_id}.jsonl"], (f"{run_id}.{number}.jsonl" for number in count(2)))
    return next(filter(None, (_claimed(folder / name, run_id, store) for name in names)))


def leftovers(folder: Path) -> list[Leftover]:
    """The outboxes in `folder` that no living process holds. Takes no time when there are none."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        if _is_held(path):
            continue
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline())
            found.append(Leftover(path, head["run"], head["store"]))
        except (OSError, ValueError, TypeError, KeyError):
            # Sent and removed just now, or killed within its first line: there is nothing in it.
            continue
    return found


def take_over(left: Leftover, store: Store) -> Outbox | None:
    """The outbox of a dead process, which is being sent now; None when another process was faster."""
    return _claimed(left.path, left.run_id, store) if left.path.exists() else None


def kept_points(folder: Path, run_id: str) -> list[Point]:
    """The points of a run that lie here, sent or not; for whoever only looks."""
    found: list[Point] = []
    for path in sorted(folder.glob(f"{run_id}*.jsonl")):
        for line in _lines(path):
            try:
                entry = _entry(json.loads(line))
            except (ValueError, TypeError, AttributeError):
                continue  # it is being written just now
            if isinstance(entry, Report):
                found += entry.points()
    return found


class Outbox:
    """One file, and the thread that sends it. Good from any thread of the process that holds it."""

    def __init__(self, path: Path, lock: FileLock, run_id: str, store: Store) -> None:
        """Continue the file at `path`, or begin it; `lock` is held (see `open_outbox`)."""
        self.path = path
        self._lock, self._run_id, self._store = lock, run_id, store
        self._entries: deque[tuple[int, Report | Ending]] = deque()  # with where in the file they end
        self._known: set[tuple[str, int]] = set()
        self._changed = threading.Condition()
        self._hurry_until, self._closing = 0.0, False
        self._unreachable = self._refused = False
        self._unwritten = bytearray()
        self._size = _cut_torn_line(path)
        self._read()
        self._file = path.open("ab", buffering=0)
        if not self._size:
            self._append({"run": run_id, "store": store.address})
        # Log lines of the thread belong to the flow run that this is part of.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._send_all,), name=f"{SENDER} {run_id}", daemon=True
        )
        self._thread.start()

    def know(self, points: Iterable[tuple[str, int]]) -> None:
        """Name points (metric, step) that the store has: reported again, they are left out."""
        with self._changed:
            self._known.update(points)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep figures, with the time, and return; a metric that has the step already is left out."""
        values = {name: float(value) for name, value in metrics.items()}
        with self._changed:
            new = {name: value for name, value in values.items() if (name, step) not in self._known}
            if new:
                self._known.update((name, step) for name in new)
                self._put(Report(int(time.time() * 1000), step, new))

    def end(self, ending: Ending) -> None:
        """Keep how the run ended; the store is told after all points before it."""
        with self._changed:
            self._put(ending)

    def flush(self, wait_s: float) -> bool:
        """Wait until the store has everything, no longer than `wait_s`; whether it has."""
        with self._changed:
            self._hurry(wait_s)
            return self._changed.wait_for(lambda: not self._entries, wait_s)

    def close(self, wait_s: float) -> bool:
        """Remove the file when the store has everything; wait for that no longer than `wait_s`.

        What is not sent by then stays in the file, and a warning says where. This process goes on
        trying; after its end `leftovers` finds the file.
        """
        with self._changed:
            self._closing = True
            self._hurry(wait_s)
        self._thread.join(wait_s)
        if not self._thread.is_alive():
            return True
        log.warning(
            "MLflow at %s has not taken all of run %s within %.0f s: the rest waits in %s, and the next "
            "'tunesmith' command that uses MLflow sends it",
            self._store.address,
            self._run_id,
            wait_s,
            self.path,
        )
        return False

    def close_later(self) -> None:
        """Remove the file when the store has everything, without waiting for that."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _put(self, entry: Report | Ending) -> None:
        end = self._append(asdict(entry))
        self._entries.append((end, entry))
        self._changed.notify_all()

    def _append(self, record: Mapping[str, Any]) -> int:
        """Write a line; where it ends. What a full disk does not take is written before the next line."""
        had_room = not self._unwritten
        self._unwritten += json.dumps(record).encode() + b"\n"
        end = self._size + len(self._unwritten)
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten) or 0
                del self._unwritten[:written]
                self._size += written
        except OSError as fault:
            if had_room:
                log.warning("%s cannot be written to (%s): points wait in memory alone", self.path, fault)
        return end

    def _read(self) -> None:
        """Queue what a file that is there has not sent, and know all that it ever took."""
        sent, end, damaged = 0, 0, 0
        entries: list[tuple[int, Report | Ending]] = []
        for line in _lines(self.path):
            end += len(line)
            try:
                record = json.loads(line)
                sent = record.get("sent", sent)
                if entry := _entry(record):
                    entries.append((end, entry))
            except (ValueError, TypeError, AttributeError):
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged lines are passed over", self.path, damaged)
        self._entries.extend(each for each in entries if each[0] > sent)
        for _, entry in entries:
            if isinstance(entry, Report):
                self._known.update((name, entry.step) for name in entry.metrics)

    def _send_all(self) -> None:
        """The thread: send until the outbox is closed and empty."""
        pause_s = FIRST_PAUSE_S
        while batch := self._next_batch():
            try:
                if not self._refused:
                    self._send([entry for _, entry in batch])
            except RefusedError as fault:
                self._set_aside(fault)
            except Exception as fault:  # whatever a client raises, the points are kept
                self._say_unreachable(fault)
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            self._mark_sent(batch)
        self._remove()

    def _next_batch(self) -> list[tuple[int, Report | Ending]]:
        """Reports of up to `BATCH_POINTS` points, or one ending; nothing when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries or self._closing)
            self._changed.wait_for(self._worth_sending, SEND_EVERY_S)
            batch: list[tuple[int, Report | Ending]] = []
            points = 0
            for end, entry in self._entries:
                points += len(entry.metrics) if isinstance(entry, Report) else BATCH_POINTS
                if batch and points > BATCH_POINTS:
                    break
                batch.append((end, entry))
            return batch

    def _worth_sending(self) -> bool:
        return self._closing or self._hurried() or len(self._entries) >= MANY_REPORTS

    def _send(self, batch: Sequence[Report | Ending]) -> None:
        points = [point for entry in batch if isinstance(entry, Report) for point in entry.points()]
        if points:
            self._store.take_points(self._run_id, points)
        for entry in batch:
            if isinstance(entry, Ending):
                self._store.take_ending(self._run_id, entry)
        if self._unreachable:
            self._unreachable = False
            log.info("MLflow at %s takes points again", self._store.address)

    def _mark_sent(self, batch: Sequence[tuple[int, Report | Ending]]) -> None:
        with self._changed:
            if not self._refused:
                self._append({"sent": batch[-1][0]})
            for _ in batch:
                self._entries.popleft()
            self._changed.notify_all()

    def _say_unreachable(self, fault: Exception) -> None:
        """Once an outage."""
        if self._unreachable:
            return
        self._unreachable = True
        log.warning(
            "MLflow at %s cannot be written to (%s): %sthe points of run %s wait in %s until it can",
            self._store.address,
            fault,
            "" if self._closing else "training goes on, and ",
            self._run_id,
            self.path,
        )

    def _set_aside(self, fault: RefusedError) -> None:
        aside = self.path.with_suffix(f".{int(time.time())}.refused")
        self.path.rename(aside)
        self._refused = True
        log.warning(
            "MLflow at %s refuses the points of run %s (%s): they stay in %s, and are not sent again",
            self._store.address,
            self._run_id,
            fault,
            aside,
        )

    def _hurry(self, wait_s: float) -> None:
        self._hurry_until = max(self._hurry_until, time.monotonic() + wait_s)
        self._changed.notify_all()

    def _hurried(self) -> bool:
        return time.monotonic() < self._hurry_until

    def _pause(self, pause_s: float) -> None:
        if self._hurried():
            time.sleep(HURRIED_PAUSE_S)
            return
        with self._changed:
            self._changed.wait_for(self._hurried, pause_s)

    def _remove(self) -> None:
        with _folder_lock(self.path.parent):
            self._file.close()
            self.path.unlink(missing_ok=True)
            _lock_path(self.path).unlink(missing_ok=True)
            self._lock.release()


def _is_held(path: Path) -> bool:
    with _folder_lock(path.parent):
        try:
            with FileLock(_lock_path(path), timeout=0):
                return False
        except Timeout:
            return True


def _claimed(path: Path, run_id: str, store: Store) -> Outbox | None:
    """The outbox at `path`, if no living process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(path), thread_local=False)  # the sending thread releases it
    with _folder_lock(path.parent):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return Outbox(path, lock, run_id, store)


def _folder_lock(folder: Path) -> FileLock:
    """Held while a file is claimed or removed, so that nobody takes a lock that is being removed."""
    return FileLock(folder / ".lock")


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _cut_torn_line(path: Path) -> int:
    """Cut off what was being written when the process died; the size of what stays."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
    return whole


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file


def _entry(record: Mapping[str, Any]) -> Report | Ending | None:
    """What a line holds; None for the head and for marks."""
    if "metrics" in record:
        return Report(**record)
    return Ending(**record) if "status" in record else None
