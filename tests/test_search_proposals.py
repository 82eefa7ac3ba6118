"""Proposals are a function of seed and what is known, avoid what did not fit, and never repeat."""

from __future__ import annotations

import builtins
import math
from statistics import fmean, median
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search.proposals import Known, check_sampler, propose
from tasks.errors import InputError

SPACE = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "num_layers": CategoricalDistribution((2, 4, 8, 16)),
}


def loss(params: Any) -> float:
    return abs(math.log10(params["learning_rate"]) + 3) + 0.1 * (params["num_layers"] != 8)


def searched(count: int, seed: int, fits: Any = lambda params: True) -> list[Known]:
    known: list[Known] = []
    for _ in range(count):
        params = propose(SPACE, known, seed, "tpe")
        assert params is not None
        known.append(Known(params, (loss(params),)) if fits(params) else Known(params, violation=0.5))
    return known


def test_the_same_is_proposed_again_when_the_same_is_known() -> None:
    known = searched(12, seed=3)
    for place, each in enumerate(known):
        assert propose(SPACE, known[:place], 3, "tpe") == each.params
    assert propose(SPACE, [], 4, "tpe") != known[0].params


def test_later_proposals_are_better_than_those_at_random() -> None:
    losses = [[each.values[0] for each in searched(27, seed) if each.values] for seed in range(6)]
    first = median(loss for each in losses for loss in each[:6])
    assert median(loss for each in losses for loss in each[12:]) < 0.7 * first


def test_what_did_not_fit_is_proposed_more_seldom() -> None:
    """Half of the space does not fit."""
    over = [
        each.violation > 0
        for seed in range(8)
        for each in searched(36, seed, fits=lambda params: params["num_layers"] <= 4)[12:]
    ]
    assert fmean(over) < 0.35


def test_a_trial_that_stopped_early_counts_as_worse_than_all_that_went_on() -> None:
    """Its loss, after fewer updates, cannot be compared; it would look the best here."""
    goods = [
        Known({"learning_rate": 10 ** (-2 - 0.01 * n), "num_layers": 2}, (1.0 + n / 100,)) for n in range(10)
    ]
    rates = {}
    for stopped_at in (None, 1):
        bads = [
            Known({"learning_rate": 10 ** (-4.5 - 0.01 * n), "num_layers": 16}, (0.1,), stopped_at=stopped_at)
            for n in range(10)
        ]
        drawn = [propose(SPACE, [*goods, *bads], seed, "tpe") for seed in range(20)]
        rates[stopped_at] = sum(params["learning_rate"] < 1e-3 for params in drawn if params)
    assert rates[None] > 15
    assert rates[1] < 10


def test_pending_trials_are_avoided_though_nothing_is_known_of_them() -> None:
    known = searched(10, seed=0)
    pending = Known({"learning_rate": 1e-3, "num_layers": 8})
    assert propose(SPACE, [*known, pending], 0, "tpe") is not None


def test_a_finite_space_is_gone_through_without_repeating_and_then_ends() -> None:
    space = {
        "rank": CategoricalDistribution((8, 16, 32)),
        "num_layers": CategoricalDistribution((2, 4, 8, 16)),
    }
    known: list[Known] = []
    while (params := propose(space, known, 0, "tpe")) is not None:
        known.append(Known(params, (1.0,)))
    assert len({tuple(each.params.items()) for each in known}) == len(known) == 12


def test_several_objectives_are_sampled() -> None:
    known: list[Known] = []
    for _ in range(14):
        params = propose(SPACE, known, 0, "tpe", objectives=2)
        assert params is not None
        known.append(Known(params, (loss(params), float(params["num_layers"]))))


def test_the_gp_sampler_without_torch_is_refused_before_the_first_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = builtins.__import__

    def without_torch(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(InputError, match="needs PyTorch"):
        check_sampler("gp")
    check_sampler("tpe")
