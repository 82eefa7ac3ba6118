"""Answers of two models that are never to be told apart by the page, some of them hostile."""

from __future__ import annotations

import random

from tasks.evaluate.blind import Choice, Comparison, Contestant, compare
from tasks.evaluate.blind_verdicts import Verdict, Verdicts

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2><!--<script>\u202e\x1b[2J"
)

A = Contestant("a" * 32, "careful-cat (aaaaaaaa)", "aaaaaaaa")
B = Contestant("b" * 32, "bold-badger (bbbbbbbb)", "bbbbbbbb")

REVIEWER = "00112233445566ff"


def comparison(prompts: int = 10, seed: int = 0, most: int | None = None, same: int = 0) -> Comparison:
    """Answers whose texts say whose they are ("amber" is A's), the last `same` of them equal."""
    rows = [(f"question {number}? {HOSTILE}", f"reference {number}") for number in range(prompts)]
    shared = set(rows[prompts - same :])
    first = {row: f"amber {row[1]} {HOSTILE}" for row in rows}
    second = {row: first[row] if row in shared else f"blue {row[1]}" for row in rows}
    return compare(A, first, B, second, seed, most)


def choice_for(comparison: Comparison, place: int, wanted: str | None) -> Choice:
    """The side to choose at a place for "a" or "b" to win; None for a tie."""
    left = comparison.key.left[comparison.pairs[place].id]
    return "tie" if wanted is None else "left" if wanted == left else "right"


def verdicts(comparison: Comparison, outcome: str, reviewer: str = REVIEWER, rated: bool = False) -> Verdicts:
    """Verdicts by a string of a, b and t; if `rated` A gets fives and B twos for accuracy."""
    made = []
    for place, letter in enumerate(outcome):
        pair = comparison.pairs[place]
        scores = {"a": {"accuracy": 5}, "b": {"accuracy": 2}}
        on_left = comparison.key.left[pair.id]
        on_right = "b" if on_left == "a" else "a"
        given = {"left": scores[on_left], "right": scores[on_right]} if rated else {}
        made.append(Verdict(pair.id, choice_for(comparison, place, letter.replace("t", "") or None), **given))
    return Verdicts(comparison.key, reviewer, tuple(made))


def outcomes(count: int, seed: int) -> str:
    """Random a, b and t."""
    return "".join(random.Random(seed).choices("abt", k=count))
