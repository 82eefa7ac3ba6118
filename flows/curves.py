"""Curves in the terminal: lines of braille dots, two columns and four rows of them in a character."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a braille character, the bit of each dot by row and column (Unicode 2800)."""

COLOURS = ("cyan", "yellow", "green", "magenta")

LABEL = 9
"""Characters of the values beside the curves."""

Curve = Sequence[tuple[int, float]]


def draw_curves(curves: Mapping[str, Curve], width: int, height: int) -> Text:
    """Curves over steps on one scale, in colours, with their names below.

    Args:
        curves: by name; points without a finite value are left out.
        width, height: of the whole, in characters.
    """
    known = {
        name: [(step, value) for step, value in curve if math.isfinite(value)]
        for name, curve in curves.items()
    }
    known = {name: curve for name, curve in known.items() if curve}
    if not known:
        return Text("no figures yet", style="dim")
    columns, rows = max(8, width - LABEL), max(3, height - 2)
    steps = [step for curve in known.values() for step, _ in curve]
    values = [value for curve in known.values() for _, value in curve]
    frame = _Frame(columns, rows, (min(steps), max(steps)), (min(values), max(values)))
    for index, curve in enumerate(known.values()):
        frame.line(curve, COLOURS[index % len(COLOURS)])
    text = frame.text()
    text.append(
        f"{'':{LABEL}}{frame.steps[0]:<{columns // 2}}{frame.steps[1]:>{columns - columns // 2}}\n", "dim"
    )
    text.append(" " * LABEL)
    for index, (name, curve) in enumerate(known.items()):
        text.append(f"── {name} {curve[-1][1]:.4g}   ", COLOURS[index % len(COLOURS)])
    return text


class _Frame:
    def __init__(self, columns: int, rows: int, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self.columns, self.rows, self.steps = columns, rows, steps
        low, high = values
        self._low, self._high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self._bits = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]

    def line(self, curve: Curve, style: str) -> None:
        """Points joined by straight lines."""
        dots = [self._dot(step, value) for step, value in curve]
        for (x, y), (to_x, to_y) in zip(dots, [*dots[1:], dots[-1]], strict=True):
            length = max(abs(to_x - x), abs(to_y - y), 1)
            for part in range(length + 1):
                across, down = x + (to_x - x) * part / length, y + (to_y - y) * part / length
                self._set(round(across), round(down), style)

    def text(self) -> Text:
        """The curves with the values at their left."""
        text = Text()
        for row in range(self.rows):
            value = self._high - (self._high - self._low) * row / (self.rows - 1)
            text.append(
                f"{value:>{LABEL - 2}.4g} ┤" if row % 4 == 0 or row == self.rows - 1 else " " * LABEL, "dim"
            )
            for bits, style in zip(self._bits[row], self._styles[row], strict=True):
                text.append(chr(0x2800 + bits) if bits else " ", style)
            text.append("\n")
        return text

    def _dot(self, step: int, value: float) -> tuple[int, int]:
        first, last = self.steps
        across = (step - first) / (last - first) if last > first else 0.0
        down = (self._high - value) / (self._high - self._low)
        return round(across * (2 * self.columns - 1)), round(down * (4 * self.rows - 1))

    def _set(self, x: int, y: int, style: str) -> None:
        row, column = y // 4, x // 2
        self._bits[row][column] |= DOTS[y % 4][x % 2]
        self._styles[row][column] = style
