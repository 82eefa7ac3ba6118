"""The comparison of base and tuned in lines that tables show: report page, Prefect, command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.evaluate.intervals import Interval
from tasks.evaluate.side_by_side import Evaluation, better, numbers

MEANINGS = {
    "test_loss": "test loss (nats a token)",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "general_loss": "general texts, loss",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "exact_match": "exact match",
    "exact_match_normalised": "exact match, normalised",
    "format_valid": "right format",
    "empty": "empty answers",
    "repetition": "repetition",
    "cut_off": "cut off at max_tokens",
    "answer_tokens": "answer length (tokens)",
    "latency_s": "latency (s)",
    "tokens_per_second": "tokens/s",
}
"""What tables call the figures, in their order; chrF before BLEU, which is 0 on answers of a few words."""

SHARES = {
    "token_accuracy", "exact_match", "exact_match_normalised", "format_valid", "empty", "repetition",
    "cut_off",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One figure of both models.

    Attributes:
        label: what a table calls it.
        base, tuned: as text.
        change: tuned minus base with its interval, as text; empty where no interval is known.
        better: True or False where the change is more than chance, else None.
    """

    name: str
    label: str
    base: str
    tuned: str
    change: str
    better: bool | None

    @property
    def verdict(self) -> str:
        """In a word, where there is an interval."""
        if not self.change:
            return ""
        return {True: "better", False: "worse", None: "may be chance"}[self.better]


def evaluation_lines(figures: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Interval]) -> list[Line]:
    """The figures that both models have, losses first, then scores of answers.

    Args:
        figures: of `Evaluation.figures`.
        changes: of `Evaluation.changes`.
    """
    base, tuned = numbers(figures["base"]), numbers(figures["tuned"])
    own = [name for name in tuned if name not in MEANINGS]
    names = [*MEANINGS, *own]
    lines = []
    for name in names:
        if name in base and name in tuned:
            found = changes.get(name)
            lines.append(
                Line(
                    name,
                    MEANINGS.get(name, name),
                    number(name, base[name]),
                    number(name, tuned[name]),
                    change(name, found) if found else "",
                    better(name, found) if found else None,
                )
            )
    return lines


def number(name: str, value: float) -> str:
    """A figure as text, shares as percentages."""
    if name in SHARES:
        return f"{value:.1%}"
    if name.endswith("_loss"):
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def change(name: str, found: Interval) -> str:
    """A change and its interval as text: "-1.13 [-1.30, -0.96]"."""
    scale, digits = (100, 1) if name in SHARES else (1, 3 if name.endswith("_loss") else 2)
    value, low, high = (f"{scale * part:+.{digits}f}" for part in (found.change, found.low, found.high))
    return f"{value} [{low}, {high}]"


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The comparison as a Markdown table, the form of Prefect's artifacts."""
    table = ["| | base | tuned | change, 95% interval | |", "|---|---:|---:|---:|---|"]
    for line in evaluation_lines(evaluation.figures(), evaluation.changes()):
        label = line.label.replace("|", "\\|")
        table.append(f"| {label} | {line.base} | {line.tuned} | {line.change} | {line.verdict} |")
    return "\n".join(table) + "\n"
