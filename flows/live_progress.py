"""How far a run is, live in Prefect's UI: every wait of a step is a progress artifact of its task run.

The step is never kept waiting: it leaves numbers behind, and a thread sends them every few seconds. An
artifact belongs to the task run, or the flow run, in which its wait began.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from tasks.progress import Bar, also_shown_on

log = logging.getLogger(__name__)

SEND_EVERY_S = 5.0

WORTH_SHOWING_S = 2.0
"""A wait that is over sooner leaves no artifact."""


@contextmanager
def live_progress() -> Iterator[None]:
    """Show the waits of the block in Prefect, as far as their length is known."""
    with also_shown_on(_InPrefect()):
        yield


class _InPrefect:
    @contextmanager
    def bar(self, title: str, total: float | None) -> Iterator[Bar]:
        if not total:
            yield _Sent(title, 1.0)
            return
        bar = _Sent(title, total)
        bar.start()
        try:
            yield bar
        finally:
            bar.stop()


class _Sent:
    """One wait: what the step has said of it, and the thread that passes it on."""

    def __init__(self, title: str, total: float) -> None:
        self._title, self._total = title, total
        self._done, self._note = 0.0, ""
        self._over = threading.Event()
        self._artifact: UUID | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._send_all,), daemon=True)

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread without waiting for it: a server that does not answer keeps nobody."""
        self._over.set()

    def _send_all(self) -> None:
        over = self._over.wait(WORTH_SHOWING_S)
        while not over:
            self._send()
            over = self._over.wait(SEND_EVERY_S)
        if self._artifact is not None:
            self._send()

    def _send(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = min(100.0, 100 * self._done / self._total)
        told = ", ".join(filter(None, [f"{self._title}: {self._done:g} of {self._total:g}", self._note]))
        try:
            if self._artifact is None:
                self._artifact = cast(UUID, create_progress_artifact(percent, _key(self._title), told))
            else:
                update_progress_artifact(self._artifact, percent, told)
        except Exception as error:
            log.debug("progress is not in Prefect: %s", error)


def _key(title: str) -> str:
    """A title as Prefect takes keys: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "progress"
