"""How a step tells whoever is watching how far it is; silent when nobody watches.

A step writes `with progress("training", total=80) as bar: bar.advance(1, "loss 2.31")`. The command
line listens and draws; a worker without a screen does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


_display: Display | None = None


def show_progress_on(display: Display | None) -> None:
    """Send the progress of every step of this process to `display`; None for nobody."""
    global _display
    _display = display


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Bar]:
    """A wait worth showing; `total` in any unit, None when unknown."""
    if _display is None:
        yield _Silent()
        return
    with _display.bar(title, total) as bar:
        yield bar
