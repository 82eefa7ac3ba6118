"""What a person sees while a flow runs: a bar for every wait, a line for everything that is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tasks.progress import Bar, show_progress_on

NAMES = ("tasks", "flows", "search")
"""The loggers whose messages are for a person."""

WORTH_A_LINE_S = 2.0


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.note = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.note = note or self.note
        self._progress.update(self._task, advance=amount, note=self.note)


class Screen:
    """Draws the progress of steps with rich; where there is no terminal, prints a line per wait."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self._quiet = quiet
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )

    @contextmanager
    def bar(self, title: str, total: float | None) -> Iterator[Bar]:
        """Show a bar until the block ends; leave a line behind when it took more than two seconds."""
        if self.console.is_terminal and not self._progress.tasks:
            self._progress.start()
        task = self._progress.add_task(title, total=total, note="")
        bar = _Bar(self._progress, task)
        started = time.perf_counter()
        try:
            yield bar
        finally:
            self._progress.remove_task(task)
            if self.console.is_terminal and not self._progress.tasks:
                self._progress.stop()
        seconds = time.perf_counter() - started
        if seconds > WORTH_A_LINE_S and not self._quiet:
            self.line(f"[dim]{title:<24}{seconds:6.1f} s  {bar.note}")

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)


class _Lines(logging.Handler):
    """Messages of the steps, as lines on the screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        self._screen.console.print(Text(record.getMessage(), style=style), highlight=False, soft_wrap=True)


@contextmanager
def screen(quiet: bool = False) -> Iterator[Screen]:
    """Show progress and messages of every step on the terminal until the block ends.

    With `quiet` of the messages only warnings, and no lines of waits that are over.
    """
    shown = Screen(Console(stderr=True), quiet)
    handler = _Lines(shown)
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    show_progress_on(shown)
    for name in NAMES:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield shown
    finally:
        show_progress_on(None)
        for name in NAMES:
            logging.getLogger(name).removeHandler(handler)
