"""What `tunesmith ab` prints: who won, how sure that is, ratings, and how a judge fared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.evaluate.blind import CRITERIA, LETTERS
from tasks.prepare.page import printable

if TYPE_CHECKING:
    from tasks.evaluate.blind_tally import Tally
    from tasks.evaluate.judge import Judgement

SURE = 0.05


def print_tally(console: Console, counted: Tally) -> None:
    """Wins, ties and mean ratings by model; the test and the interval in a sentence."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    rated = [name for name in CRITERIA if any(name in counted.ratings[letter] for letter in LETTERS)]
    for heading in ("", "wins", "win rate", "95% interval", *rated):
        table.add_column(heading, justify="left" if not heading else "right")
    for letter in LETTERS:
        rate, (low, high) = counted.win_rate(letter), counted.interval(letter)
        ratings = [counted.ratings[letter].get(name) for name in rated]
        table.add_row(
            Text(printable(counted.key.contestant(letter).name)),
            str(counted.wins[letter]),
            "-" if rate is None else f"{rate:.0%}",
            "-" if rate is None else f"{low:.0%} to {high:.0%}",
            *("-" if value is None else f"{value:.2f}" for value in ratings),
        )
    console.print(table)
    console.print(_summary(counted), highlight=False)


def print_judgement(console: Console, judgement: Judgement) -> None:
    """How many pairs the judge decided, and why it did not decide the others."""
    decided = len(judgement.verdicts())
    console.print(
        Text(
            f"judge {printable(judgement.model)}: {decided} of {len(judgement.opinions)} pairs judged; "
            f"{judgement.at_odds} ties because the winner changed with the order"
        )
    )
    for reason, count in judgement.failures.most_common():
        console.print(Text(f"{count} failed: {printable(reason)}", style="yellow"))


def tally_as_json(counted: Tally) -> dict[str, Any]:
    """The figures of both models, by their names."""
    return {
        "comparison": counted.key.comparison,
        "seed": counted.key.seed,
        **{
            letter: {"name": counted.key.contestant(letter).name, **counted.figures(letter)}
            for letter in LETTERS
        },
    }


def judgement_as_json(judgement: Judgement) -> dict[str, Any]:
    """How the judge fared."""
    return {
        "judge": judgement.model,
        "judged": len(judgement.verdicts()),
        "at_odds": judgement.at_odds,
        "failures": dict(judgement.failures),
    }


def _summary(counted: Tally) -> str:
    """The rest in words; ties are in neither the test nor the interval."""
    p_value = counted.p_value
    verdict = "a difference" if p_value < SURE else "no difference shown"
    told = [f"{counted.ties} ties, left out of rate, interval (Clopper-Pearson) and test"]
    told += [f"{counted.undecided} prompts undecided"] if counted.undecided else []
    told += (
        [f"{counted.key.identical} prompts with the same answer not shown"] if counted.key.identical else []
    )
    told += [f"{counted.reviewers} reviewers, a vote a prompt"] if counted.reviewers > 1 else []
    told += [f"exact sign test, two-sided: p = {p_value:.3g}, {verdict}"]
    return "; ".join(told)
