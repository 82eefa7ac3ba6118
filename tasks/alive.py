"""Which process works on something, and whether it is gone: what a power cut leaves RUNNING tells by this."""

from __future__ import annotations

import os
import platform

CLOCK_SET_S = 5.0
"""A process's time of creation moves when the clock is set; a number is given again much later than that."""


def this_process() -> str:
    """This process in words that no other process, now or later, shares: host, id, time of its start."""
    import psutil

    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.2f}"


def is_gone(process: str) -> bool:
    """Whether a process of `this_process` ran on this machine and has ended; False if unknown."""
    import psutil

    host, pid, started = _parts(process)
    if host != platform.node():
        return False
    try:
        found = psutil.Process(pid)
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - started) > CLOCK_SET_S
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _parts(process: str) -> tuple[str, int, float]:
    try:
        host, pid, started = process.rsplit(" ", 2)
        return host, int(pid), float(started)
    except ValueError:
        return "", 0, 0.0
