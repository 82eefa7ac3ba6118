"""What verdicts amount to: wins, ties, an exact sign test, an interval, mean ratings.

A prompt has one vote, that of the majority of its reviewers: verdicts of several people on the same two
answers are not independent, and the sign test counts independent ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from tasks.errors import InputError
from tasks.evaluate.blind import CRITERIA, Key, Letter, comparison_folder, other
from tasks.evaluate.blind_verdicts import Verdict, Verdicts, read_verdicts

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Tally:
    """Votes about one comparison, a prompt each.

    Attributes:
        wins: by model.
        ties: votes for neither.
        undecided: prompts of the comparison without a vote.
        ratings: by model and criterion, the mean (1 to 5) of those given.
    """

    key: Key
    wins: Mapping[Letter, int]
    ties: int
    undecided: int
    reviewers: int
    ratings: Mapping[Letter, Mapping[str, float]]

    @property
    def p_value(self) -> float:
        """Of the two-sided exact sign test: ties are left out (Dixon and Mood 1946)."""
        from scipy.stats import binomtest

        decided = self.wins["a"] + self.wins["b"]
        return float(binomtest(self.wins["a"], decided).pvalue) if decided else 1.0

    def win_rate(self, letter: Letter) -> float | None:
        """Wins of a model, of the votes that are no ties; None when there are none."""
        decided = self.wins["a"] + self.wins["b"]
        return self.wins[letter] / decided if decided else None

    def interval(self, letter: Letter) -> tuple[float, float]:
        """The 95% interval of `win_rate` by Clopper and Pearson (1934).

        It inverts the sign test: it leaves out one half exactly when the test's p is below 5%.
        """
        from scipy.stats import binomtest

        decided = self.wins["a"] + self.wins["b"]
        if not decided:
            return 0.0, 1.0
        found = binomtest(self.wins[letter], decided).proportion_ci(CONFIDENCE, method="exact")
        return float(found.low), float(found.high)

    def figures(self, letter: Letter) -> dict[str, float]:
        """All of it as a model's metrics."""
        low, high = self.interval(letter)
        rate = self.win_rate(letter)
        counts = {
            "wins": self.wins[letter],
            "losses": self.wins[other(letter)],
            "ties": self.ties,
            "undecided": self.undecided,
            "identical": self.key.identical,
            "reviewers": self.reviewers,
        }
        rates = {} if rate is None else {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
        rated = {f"rating_{name}": value for name, value in self.ratings[letter].items()}
        return {**counts, **rates, "p_value": self.p_value, **rated}


def accept(verdicts: Verdicts) -> list[Verdicts]:
    """Keep a reviewer's verdicts in place of earlier ones; those of all reviewers of the comparison."""
    if not verdicts.verdicts:
        raise InputError("there is no verdict in the file; decide a pair first")
    folder = comparison_folder(verdicts.key.comparison) / "verdicts"
    verdicts.write(folder / f"{verdicts.reviewer}.json")
    return [read_verdicts(path) for path in sorted(folder.glob("*.json"))]


def tally(key: Key, given: Sequence[Verdicts]) -> Tally:
    """Count the verdicts of all reviewers of a comparison."""
    balance: Counter[str] = Counter()
    ratings: dict[Letter, list[Mapping[str, int]]] = {"a": [], "b": []}
    for verdict in (verdict for each in given for verdict in each.verdicts):
        balance[verdict.pair] += {"a": 1, "b": -1, None: 0}[key.winner(verdict.pair, verdict.choice)]
        for letter, rated in _rated(key, verdict):
            ratings[letter].append(rated)
    wins: dict[Letter, int] = {
        "a": sum(votes > 0 for votes in balance.values()),
        "b": sum(votes < 0 for votes in balance.values()),
    }
    return Tally(
        key,
        wins,
        ties=len(balance) - sum(wins.values()),
        undecided=len(key.left) - len(balance),
        reviewers=len(given),
        ratings={letter: _means(ratings[letter]) for letter in wins},
    )


def _rated(key: Key, verdict: Verdict) -> Iterable[tuple[Letter, Mapping[str, int]]]:
    left = key.left[verdict.pair]
    return (left, verdict.left), (other(left), verdict.right)


def _means(ratings: Sequence[Mapping[str, int]]) -> dict[str, float]:
    given = {name: [rated[name] for rated in ratings if name in rated] for name in CRITERIA}
    return {name: mean(values) for name, values in given.items() if values}
