"""SIGINT and SIGTERM, put off until the training step under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class PutOffSignals:
    """While the block runs, the first signal to stop is remembered; a second one acts at once.

    The handlers before are put back when the block ends or a signal acts, and it is they who say
    what a signal does: raise KeyboardInterrupt, exit, whatever Prefect or the command line chose. A
    signal that was ignored (a shell's background job ignores Ctrl-C) stays ignored, and outside of
    the main thread, where Python allows no handlers, nothing is put off.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._number is not None

    def act(self) -> None:
        """Let the signal that came do what it does."""
        self._restore()
        number, self._number = self._number, None
        if number is not None:
            signal.raise_signal(number)

    def __enter__(self) -> PutOffSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is None:
            self.act()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again, self._number = self.requested, number
        if again:
            self.act()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
