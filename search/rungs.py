"""Which trials go on and which stop: pure functions of what the trials have lost at each rung.

A rung is a share of the full length, in updates. Rules look at losses and numbers, never at who was first:
a search that was killed, or had another number of children, decides as the undisturbed one.

- halving: when all trials of a bracket have reached a rung, the best of `reduction` go on, to a rung
  `reduction` times as far (successive halving, Jamieson and Talwalkar 2016, arXiv:1502.07943). From
  `HYPERBAND_FROM` trials on there are several brackets, which begin at later and later rungs, so that late
  bloomers get their chance (Hyperband, Li et al. 2018, arXiv:1603.06560).
- median: a trial stops at a rung where it is worse than the median of those before it (Golovin et al. 2017).
- none: every trial runs to its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tasks.config import SearchSettings, TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.loop import total_steps

HYPERBAND_FROM = 40
"""Below, a bracket has too few trials for the sampler to learn anything (about ten are needed)."""

MEDIAN_OF = 5
"""A median of fewer trials stops nothing."""


@dataclass(frozen=True)
class Bracket:
    """Trials that compete: `size` of them begin with the rung `first`; an unlimited one is not full yet."""

    first: int
    size: float


@dataclass(frozen=True)
class Entrant:
    """A trial, as the rules see it.

    Attributes:
        losses: the lowest validation loss up to each rung it has reached; all rungs for one that has ended.
        out: it did not fit or failed.
    """

    number: int
    losses: tuple[float, ...]
    out: bool = False


@dataclass(frozen=True)
class Stop:
    """A trial that does not go on past a rung, and why."""

    number: int
    rung: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the rules say now: the next rung of trials, best first, and who stops."""

    runs: tuple[tuple[int, int], ...] = ()
    stops: tuple[Stop, ...] = ()


def rung_shares(search: SearchSettings) -> tuple[float, ...]:
    """The rungs as shares of the full length, the last is 1."""
    shares = [1.0]
    if search.rungs == "none":
        return tuple(shares)
    while shares[0] / search.reduction >= search.first_rung * (1 - 1e-9):
        shares.insert(0, shares[0] / search.reduction)
    return tuple(shares)


def brackets(search: SearchSettings, rungs: int) -> tuple[Bracket, ...]:
    """The brackets in the order in which they are run; their sizes add up to the trials wanted."""
    trials = math.inf if search.time else search.trials
    if search.rungs != "halving" or not HYPERBAND_FROM <= trials < math.inf:
        return (Bracket(0, trials),)
    # Li et al.: a bracket that begins s rungs before the last has ceil(rungs / (s + 1) reduction^s) trials.
    parts = [math.ceil(rungs / (s + 1) * search.reduction**s) for s in range(rungs - 1, -1, -1)]
    sizes = [int(trials * part / sum(parts)) for part in parts]
    sizes[0] += int(trials) - sum(sizes)
    return tuple(Bracket(first, size) for first, size in enumerate(sizes) if size)


def with_rungs(
    settings: TrainSettings, train: TokenRows, shares: Sequence[float], longest_epochs: float
) -> tuple[TrainSettings, tuple[int, ...]]:
    """A trial's settings with a validation at every rung, and the updates at each rung.

    A rung is a number of rows, the same for every trial: a share of the longest of them. One of fewer
    epochs ends on its way.
    """
    own = total_steps(train, settings)
    longest = total_steps(train, settings.model_copy(update={"epochs": longest_epochs}))
    every = min(settings.steps_per_eval, max(1, round(shares[0] * longest)))
    steps = (min(own, every * max(1, round(share * longest / every))) for share in shares[:-1])
    return settings.model_copy(update={"steps_per_eval": every}), (*steps, own)


def halving(entrants: Sequence[Entrant], bracket: Bracket, rungs: int, reduction: int) -> Plan:
    """Successive halving of one bracket; before it is full only its first rung is run."""
    members, stops = list(entrants), list[Stop]()
    keep = len(members)
    for rung in range(bracket.first, rungs):
        waiting = [each for each in members if not each.out and len(each.losses) <= rung]
        if waiting or len(entrants) < bracket.size or rung == rungs - 1:
            return Plan(tuple((each.number, rung) for each in waiting), tuple(stops))
        ranked = sorted(
            (each for each in members if not each.out), key=lambda each: (each.losses[rung], each.number)
        )
        keep = max(1, keep // reduction)
        members = ranked[:keep]
        stops += [
            Stop(each.number, rung, f"{place} of {len(ranked)} at rung {rung + 1} of {rungs}, {keep} went on")
            for place, each in enumerate(ranked[keep:], start=keep + 1)
        ]
    return Plan((), tuple(stops))


def below_median(entrants: Sequence[Entrant], rungs: int, known: int) -> Plan:
    """Every trial goes from rung to rung as long as it is no worse than the median of earlier ones.

    Args:
        entrants: in order of their numbers.
        known: how many of the trials just before one may not count, as they may be still at work.
    """
    runs, stops = [], []
    for place, each in enumerate(entrants):
        reached = len(each.losses)
        if each.out or reached == rungs:
            continue
        stop = _worse_than_median(each, entrants[: max(0, place - known)], rungs) if reached else None
        if stop:
            stops.append(stop)
        else:
            runs.append((each.number, reached))
    return Plan(tuple(runs), tuple(stops))


def to_the_end(entrants: Sequence[Entrant], rungs: int) -> Plan:
    """Every trial runs to its end."""
    waiting = (each for each in entrants if not each.out and len(each.losses) < rungs)
    return Plan(tuple((each.number, rungs - 1) for each in waiting))


def losses_at(
    val_losses: Sequence[tuple[int, float]], rung_steps: Sequence[int], ended: bool
) -> tuple[float, ...]:
    """The lowest validation loss up to each rung that was reached; a trial that has ended reached all."""
    done = max((step for step, _ in val_losses), default=0)
    reached = [steps for steps in rung_steps if ended or steps <= done]
    return tuple(
        min((loss for step, loss in val_losses if step <= steps), default=math.inf) for steps in reached
    )


def _worse_than_median(entrant: Entrant, earlier: Sequence[Entrant], rungs: int) -> Stop | None:
    rung = len(entrant.losses) - 1
    there = [each.losses[rung] for each in earlier if not each.out and len(each.losses) > rung]
    if len(there) < MEDIAN_OF or entrant.losses[rung] <= (middle := median(there)):
        return None
    reason = f"loss {entrant.losses[rung]:.4f} at rung {rung + 1} of {rungs}, over the median {middle:.4f}"
    return Stop(entrant.number, rung, reason)
