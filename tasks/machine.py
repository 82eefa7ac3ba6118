"""One training at a time on this machine: two would share its memory, and the budget of each would be wrong.

The turn is a lock that the system frees when its holder dies, however it dies. It lies in the cache folder,
which all of a person's checkouts and runs folders share.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tasks.errors import StepError
from tasks.home import cache_dir
from tasks.progress import progress
from tasks.publish import write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

WhenBusy = Literal["wait", "refuse", "share"]

LOOK_EVERY_S = 1.0


@contextmanager
def machine_turn(who: str, when_busy: WhenBusy) -> Iterator[None]:
    """Have the machine to oneself for the block. A process that has the turn already keeps it.

    Args:
        who: is working, in words: what others who wait are told.
        when_busy: wait for the one before, refuse, or share the machine with whoever works on it.

    Raises:
        StepError: another process has it, and `when_busy` is "refuse".
    """
    from filelock import FileLock, Timeout

    if when_busy == "share":
        yield
        return
    cache_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir() / "machine.lock", thread_local=False, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if when_busy == "refuse":
            raise StepError(
                f"{holder()} is training on this machine; wait for it, or set flow.when_busy to 'wait' "
                "(this one goes on when it is done) or 'share'"
            ) from None
        _wait(lock)
    try:
        if lock.lock_counter == 1:
            here = {"who": who, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M")}
            write_json(_holder_file(), here)
        yield
    finally:
        lock.release()


def holder() -> str:
    """Who has the turn, or had it last."""
    try:
        told = json.loads(_holder_file().read_text(encoding="utf-8"))
        return f"{told['who']} (process {told['pid']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _wait(lock: BaseFileLock) -> None:
    from filelock import Timeout

    log.warning("%s is training on this machine: waiting for it (Ctrl-C stops waiting)", holder())
    with progress(f"waiting for {holder()}") as bar:
        while True:
            try:
                lock.acquire(timeout=LOOK_EVERY_S)
                return
            except Timeout:
                bar.advance(LOOK_EVERY_S)


def _holder_file() -> Path:
    return cache_dir() / "machine.json"
