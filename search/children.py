"""The parent's side of the worker processes: started when needed, watched, replaced when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from search.worker import Begin, Message, Order

GRACE_S = 60.0
"""A child that was told to stop has so long to finish its step and save it."""

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

ABORTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
"""Signals that a process brings upon itself: MLX's allocation failure on CPU is a SIGSEGV."""


@dataclass(frozen=True)
class Death:
    """A child ended without being told to.

    Attributes:
        aborted: it ended itself by a fault; otherwise somebody killed it: the system, short of memory, or a
            person.
        broken: it could not run at all, which has nothing to do with what it was told to do.
    """

    reason: str
    aborted: bool
    broken: bool = False


class Child:
    """One worker process."""

    def __init__(self, begin: Begin, threads: int) -> None:
        self.connection, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `bury`)
        # -P: a folder named `search` or `tasks` in the working directory is not this one.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from search.worker import main; main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C is for the parent, who stops the children in order
        )
        theirs.close()
        with suppress(OSError):  # of a child that is dead already, `receive` says so
            self.connection.send(begin)

    def order(self, order: Order) -> None:
        """Give it something to do; of a child that is dead, `receive` says so."""
        with suppress(OSError):
            self.connection.send(order)

    def receive(self) -> Message | Death:
        """The next message, waited for."""
        try:
            message: Message = self.connection.recv()
            return message
        except (EOFError, OSError):
            return self._death()

    def dismiss(self) -> None:
        """Let it save what it does, and end."""
        self.connection.close()

    def bury(self, grace_s: float) -> None:
        """Wait for its end, and kill it when that takes too long."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._said.close()

    def _death(self) -> Death:
        code = self.process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:200]}" if lines else ""
        if code < 0:
            number = signal.Signals(-code)
            return Death(f"its process ended by {number.name}{last}", number in ABORTS)
        return Death(f"a worker process exited with {code}{last}", True, broken=True)


class Children:
    """Up to `limit` workers, started as they are asked for."""

    def __init__(self, begin: Begin, limit: int) -> None:
        self._begin = begin
        self._threads = max(1, (os.cpu_count() or 1) // limit)
        self._limit = limit
        self._idle: list[Child] = []
        self._busy: list[Child] = []

    @property
    def free(self) -> bool:
        """Whether one more order can be carried out now."""
        return len(self._busy) < self._limit

    @property
    def busy(self) -> bool:
        """Whether any order is carried out now."""
        return bool(self._busy)

    def start(self, order: Order) -> Child:
        """Give an order to a child that is idle, or to a new one."""
        child = self._idle.pop() if self._idle else Child(self._begin, self._threads)
        self._busy.append(child)
        child.order(order)
        return child

    def rest(self, child: Child) -> None:
        """A child has carried out its order."""
        self._busy.remove(child)
        self._idle.append(child)

    def lose(self, child: Child) -> None:
        """A child has died."""
        self._busy.remove(child)
        child.dismiss()
        child.bury(0)

    def messages(self, timeout_s: float) -> Iterator[tuple[Child, Message | Death]]:
        """What the children at work have to say, waiting up to `timeout_s` for the first of it."""
        by_connection: dict[Connection, Child] = {child.connection: child for child in self._busy}
        for ready in wait(list(by_connection), timeout_s):
            child = by_connection[ready]  # type: ignore[index]
            yield child, child.receive()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        children = [*self._busy, *self._idle]
        for child in children:
            child.dismiss()
        deadline = time.monotonic() + GRACE_S
        for child in children:
            child.bury(max(0.0, deadline - time.monotonic()))
        self._busy, self._idle = [], []


def _environment(threads: int) -> dict[str, str]:
    """This process's, with the cores shared out, and this code found from any working directory."""
    code = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")]))
    given = {name: os.environ.get(name, str(threads)) for name in THREADS}
    return {**os.environ, **given, "PYTHONPATH": path}
