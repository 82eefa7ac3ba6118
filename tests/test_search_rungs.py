"""The rules of the rungs: who goes on, who stops, at which update, whatever came first."""

from __future__ import annotations

import math
import random

import pytest

from search.rungs import (
    Bracket,
    Entrant,
    below_median,
    brackets,
    halving,
    losses_at,
    rung_shares,
    to_the_end,
    with_rungs,
)
from tasks.config import SearchSettings, TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.loop import total_steps


def search(**given: object) -> SearchSettings:
    return SearchSettings.model_validate(given)


def run_halving(finals: list[float], first: int = 0, rungs: int = 3, shuffle: int = 0) -> list[Entrant]:
    """Carry out a bracket; a trial's loss at a rung is its final one plus the rungs that are left."""
    entrants = {number: Entrant(number, ()) for number in range(len(finals))}
    order = random.Random(shuffle)
    while True:
        plan = halving(list(entrants.values()), Bracket(first, len(finals)), rungs, reduction=3)
        if not plan.runs:
            return list(entrants.values())
        number, rung = order.choice(plan.runs)
        losses = tuple(finals[number] + (rungs - 1 - each) for each in range(rung + 1))
        entrants[number] = Entrant(number, losses)


def reached(entrants: list[Entrant]) -> dict[int, int]:
    return {each.number: len(each.losses) for each in entrants}


def test_of_27_trials_9_and_3_go_on_and_they_are_the_best() -> None:
    finals = [((7 * n) % 27) / 10 for n in range(27)]
    steps = reached(run_halving(finals))
    best = sorted(range(27), key=lambda n: finals[n])
    assert [number for number in best if steps[number] == 3] == best[:3]
    assert [number for number in best if steps[number] == 2] == best[3:9]
    assert sum(count == 1 for count in steps.values()) == 18


def test_who_was_first_decides_nothing() -> None:
    finals = [((7 * n) % 13) / 10 for n in range(13)]
    assert len({str(sorted(reached(run_halving(finals, shuffle=seed)).items())) for seed in range(8)}) == 1


def test_nobody_goes_on_before_the_bracket_is_full_and_all_are_there() -> None:
    entrants = [Entrant(0, (1.0,)), Entrant(1, (2.0,)), Entrant(2, ())]
    assert halving(entrants, Bracket(0, 4), 3, 3).runs == ((2, 0),)
    entrants[2] = Entrant(2, (3.0,))
    assert halving(entrants, Bracket(0, 4), 3, 3).runs == ()
    assert halving(entrants, Bracket(0, 3), 3, 3).runs == ((0, 1),)


def test_a_stopped_trial_is_told_its_place() -> None:
    plan = halving([Entrant(n, (float(n),)) for n in range(6)], Bracket(0, 6), 3, 3)
    assert [stop.number for stop in plan.stops] == [2, 3, 4, 5]
    assert plan.stops[0].reason == "3 of 6 at rung 1 of 3, 2 went on"


def test_one_goes_on_however_few_there_are_and_those_that_are_out_do_not() -> None:
    entrants = [Entrant(0, (1.0,), out=True), Entrant(1, (2.0,)), Entrant(2, (), out=True)]
    assert halving(entrants, Bracket(0, 3), 3, 3).runs == ((1, 1),)
    everyone_out = [Entrant(0, (), out=True)]
    assert halving(everyone_out, Bracket(0, 1), 3, 3) == halving([], Bracket(0, 0), 3, 3)


def test_equal_losses_are_told_apart_by_number() -> None:
    plan = halving([Entrant(n, (1.0,)) for n in range(6)], Bracket(0, 6), 3, 3)
    assert [number for number, _ in plan.runs] == [0, 1]


def test_rungs_are_shares_of_the_full_length_down_to_the_first() -> None:
    assert rung_shares(search()) == pytest.approx((1 / 9, 1 / 3, 1))
    assert rung_shares(search(first_rung=1 / 27)) == pytest.approx((1 / 27, 1 / 9, 1 / 3, 1))
    assert rung_shares(search(reduction=2, first_rung=0.25)) == (0.25, 0.5, 1)
    assert rung_shares(search(rungs="none")) == (1.0,)


def test_below_forty_trials_there_is_one_bracket_and_from_there_hyperband() -> None:
    assert brackets(search(trials=39), 3) == (Bracket(0, 39),)
    several = brackets(search(trials=40), 3)
    assert [bracket.first for bracket in several] == [0, 1, 2]
    assert sum(bracket.size for bracket in several) == 40
    assert several[0].size > several[1].size > several[2].size
    assert brackets(search(trials=40, rungs="median"), 3) == (Bracket(0, 40),)
    assert brackets(search(time="8h"), 3) == (Bracket(0, math.inf),)


def test_later_brackets_begin_at_later_rungs() -> None:
    steps = reached(run_halving([0.1 * n for n in range(6)], first=1))
    assert sorted(steps.values()) == [2, 2, 2, 2, 3, 3]


def test_the_median_stops_a_trial_that_is_worse_than_those_before_it() -> None:
    before = [Entrant(n, (1.0 + n / 10, 0.5, 0.4)) for n in range(5)]
    plan = below_median([*before, Entrant(5, (1.5,)), Entrant(6, (1.1,)), Entrant(7, ())], 3, known=0)
    assert [stop.number for stop in plan.stops] == [5]
    assert plan.runs == ((6, 1), (7, 0))


def test_the_median_of_few_trials_or_of_those_still_at_work_stops_nobody() -> None:
    before = [Entrant(n, (1.0, 0.5, 0.4)) for n in range(4)]
    assert below_median([*before, Entrant(4, (9.0,))], 3, known=0).stops == ()
    five = [*before, Entrant(4, (1.0, 0.5, 0.4))]
    assert below_median([*five, Entrant(5, (9.0,))], 3, known=0).stops != ()
    assert below_median([*five, Entrant(5, (9.0,))], 3, known=1).stops == ()


def test_without_rungs_every_trial_runs_to_its_end() -> None:
    assert to_the_end([Entrant(0, (1.0,)), Entrant(1, ()), Entrant(2, (), out=True)], 1).runs == ((1, 0),)


@pytest.mark.parametrize("steps_per_eval", [1, 4, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("epochs", [3.0, 10.0])
def test_every_rung_has_a_validation_and_nearly_the_same_rows(
    token_rows: TokenRows, steps_per_eval: int, batch_size: int, epochs: float
) -> None:
    given = TrainSettings(steps_per_eval=steps_per_eval, batch_size=batch_size, epochs=epochs)
    shares = rung_shares(search())
    settings, rungs = with_rungs(given, token_rows, shares, epochs)
    assert rungs[-1] == total_steps(token_rows, settings)
    assert settings.steps_per_eval <= steps_per_eval
    assert all(steps % settings.steps_per_eval == 0 for steps in rungs[:-1])
    assert list(rungs) == sorted(rungs)
    for steps, share in zip(rungs, shares, strict=True):
        assert abs(steps - share * rungs[-1]) <= settings.steps_per_eval


def test_a_trial_of_fewer_epochs_ends_on_the_way_of_the_longest(token_rows: TokenRows) -> None:
    short, long = (
        with_rungs(TrainSettings(batch_size=1, epochs=epochs), token_rows, (1 / 9, 1 / 3, 1), 9.0)[1]
        for epochs in (2.0, 9.0)
    )
    assert long == (13, 39, 117)
    assert short == (13, 26, 26)


def test_the_loss_at_a_rung_is_the_lowest_up_to_there() -> None:
    assert losses_at([(3, 2.0), (6, 1.0), (9, 1.5)], (3, 9, 27), ended=False) == (2.0, 1.0)
    assert losses_at([(3, 2.0), (6, 1.0)], (3, 9, 27), ended=True) == (2.0, 1.0, 1.0)
    assert losses_at([], (3, 9), ended=False) == ()
