"""How a step tells whoever is watching how far it is; silent when nobody watches.

A step writes `with progress("training", total=80) as bar: bar.advance(1, "loss 2.31")`. The command
line listens and draws; a worker without a screen does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One wait on the screen."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move by `amount` of the total; `note` is shown beside the bar."""


class Display(Protocol):
    """Draws bars."""

    @contextmanager
    def bar(self, title: str, total: float | None) -> Iterator[Bar]:
        """Show a bar until the block ends; `total` is None when the length is unknown."""
        ...


class _All:
    """The same wait on every display; on none, it is silent."""

    def __init__(self, bars: list[Bar]) -> None:
        self._bars = bars

    def advance(self, amount: float = 1, note: str = "") -> None:
        for bar in self._bars:
            bar.advance(amount, note)


_display: Display | None = None
_also: list[Display] = []


def show_progress_on(display: Display | None) -> None:
    """Send the progress of every step of this process to `display`; None for nobody."""
    global _display
    _display = display


@contextmanager
def also_shown_on(display: Display) -> Iterator[None]:
    """Send the progress of every step of the block to one display more."""
    _also.append(display)
    try:
        yield
    finally:
        _also.remove(display)


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Bar]:
    """A wait worth showing; `total` in any unit, None when unknown."""
    displays = [*([] if _display is None else [_display]), *_also]
    with ExitStack() as stack:
        yield _All([stack.enter_context(display.bar(title, total)) for display in displays])
