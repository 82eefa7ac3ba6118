"""The blind comparison in a terminal: the same pairs, keys and file of verdicts as on the page."""

from __future__ import annotations

import os
import secrets
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from tasks.evaluate.blind import BEST, CRITERIA, Choice, Comparison, Pair, comparison_folder
from tasks.evaluate.blind_verdicts import Ratings, Verdict, Verdicts, read_verdicts
from tasks.prepare.page import printable

KEYS: dict[str, str] = {
    "\x1b[D": "left", "\x1bOD": "left", "l": "left",
    "\x1b[C": "right", "\x1bOC": "right", "r": "right",
    "\x1b[B": "tie", "\x1bOB": "tie", "t": "tie",
    "u": "undo", "c": "rate", "f": "reference", "q": "quit", "\x04": "quit", "": "quit",
}  # fmt: skip
"""What a key means: arrows as terminals send them, or a letter."""

CHOSEN: dict[str, Choice] = {"left": "left", "right": "right", "tie": "tie"}

LEGEND = "← l  left is better   ↓ t  tie   → r  right is better   c rate   f reference   u undo   q quit"

END = b"\x04"
"""Ctrl-D."""

BACKSPACE = (b"\x7f", b"\b")

ESCAPE_S = 0.05
"""In which the rest of an arrow key's sequence arrives."""


def judge_at_terminal(comparison: Comparison, console: Console) -> tuple[Path, int]:
    """`judge_in_terminal` by the keys of this terminal, or by lines of standard input where that is none."""
    if not sys.stdin.isatty():
        return judge_in_terminal(comparison, console, _key_in_a_line, input)
    with _single_keys() as (read_key, read_line):
        return judge_in_terminal(comparison, console, read_key, read_line)


def judge_in_terminal(
    comparison: Comparison, console: Console, read_key: Callable[[], str], read_line: Callable[[str], str]
) -> tuple[Path, int]:
    """Ask for a verdict on every pair that has none yet.

    Args:
        read_key: a key press as terminals send it, "" at the end of input.
        read_line: an answer to a question, for ratings and comments.

    Returns:
        The file of verdicts, saved after each, and how many it has.
    """
    path = comparison_folder(comparison.key.comparison) / "terminal.json"
    given = _begun(comparison, path)
    undone: dict[str, Verdict] = {}
    while len(given.verdicts) < len(comparison.pairs):
        pair = comparison.pairs[len(given.verdicts)]
        _show(console, pair, len(given.verdicts), len(comparison.pairs))
        act, verdict = _decided(pair, undone.get(pair.id), console, read_key, read_line)
        if act == "quit":
            break
        if act == "undo":
            undone |= {last.pair: last for last in given.verdicts[-1:]}
            given = replace(given, verdicts=given.verdicts[:-1])
        else:
            given = replace(given, verdicts=(*given.verdicts, verdict))
        given.write(path)
    return path, len(given.verdicts)


def _decided(
    pair: Pair,
    before: Verdict | None,
    console: Console,
    read_key: Callable[[], str],
    read_line: Callable[[str], str],
) -> tuple[str, Verdict]:
    """What is done about a pair, a choice, `undo` or `quit`, and the verdict with its ratings."""
    verdict = before or Verdict(pair.id, "tie")
    while True:
        key = read_key()
        act = KEYS.get(key) or KEYS.get(key.lower())
        if act == "rate":
            verdict = _rated(verdict, read_line)
        elif act == "reference":
            console.print(Panel(Text(printable(pair.reference) or "(none)"), title="reference"))
        elif act in ("undo", "quit"):
            return act, verdict
        elif act in CHOSEN:
            return act, replace(verdict, choice=CHOSEN[act])


def _begun(comparison: Comparison, path: Path) -> Verdicts:
    """The verdicts of an earlier session at this terminal, or none yet."""
    if path.exists():
        return read_verdicts(path)
    return Verdicts(comparison.key, secrets.token_hex(8), ())


def _show(console: Console, pair: Pair, place: int, total: int) -> None:
    console.print()
    console.rule(f"{place + 1} of {total}")
    console.print(Text(printable(pair.prompt), style="bold"))
    width = max(20, console.width // 2 - 1)
    sides = {"left": pair.left, "right": pair.right}
    panels = [
        Panel(Text(printable(text) or "(an empty answer)"), title=side, width=width)
        for side, text in sides.items()
    ]
    console.print(Columns(panels, padding=(0, 1)))
    console.print(Text(LEGEND, style="dim"))


def _rated(verdict: Verdict, read_line: Callable[[str], str]) -> Verdict:
    """The verdict with ratings of both answers and a comment; an empty line leaves one out."""
    left, right = (_ratings(side, read_line) for side in ("left", "right"))
    return replace(verdict, left=left, right=right, comment=printable(read_line("comment: ").strip()))


def _ratings(side: str, read_line: Callable[[str], str]) -> Ratings:
    ratings = {}
    for name in CRITERIA:
        while text := read_line(f"{side}, {name} (1 to {BEST}, Enter leaves it out): ").strip():
            if text.isdecimal() and 1 <= int(text) <= BEST:
                ratings[name] = int(text)
                break
    return ratings


@contextmanager
def _single_keys() -> Iterator[tuple[Callable[[], str], Callable[[str], str]]]:
    """Ways to read a key press, unechoed, and a line; Ctrl-C interrupts as always.

    The terminal stays in one mode for the whole session, lines are edited here: changing the mode loses
    what is typed in between.
    """
    import termios
    import tty

    terminal = sys.stdin.fileno()
    usual = termios.tcgetattr(terminal)

    def read_key() -> str:
        pressed = os.read(terminal, 1)
        while pressed[:1] == b"\x1b" and len(pressed) < 3 and select.select([terminal], [], [], ESCAPE_S)[0]:
            pressed += os.read(terminal, 1)
        return pressed.decode(errors="replace")

    def read_line(question: str) -> str:
        typed = ""
        unfinished = b""  # of a character of several bytes
        while True:
            print(f"\r\x1b[K{question}{typed}", end="", flush=True)
            byte = os.read(terminal, 1)
            if byte in (b"\n", b"\r", END, b""):
                print()
                return typed
            if byte in BACKSPACE:
                typed = typed[:-1]
                continue
            unfinished += byte
            with suppress(UnicodeDecodeError):
                typed, unfinished = typed + printable(unfinished.decode()), b""

    tty.setcbreak(terminal, termios.TCSADRAIN)
    try:
        yield read_key, read_line
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, usual)


def _key_in_a_line() -> str:
    """The next line of standard input as a key; empty lines are passed over."""
    for line in sys.stdin:
        if key := line.strip():
            return key
    return ""
