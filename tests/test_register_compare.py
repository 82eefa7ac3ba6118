"""Better means beyond chance where single rows are known, and in the mean where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.register.compare import compare


def losses(values: list[float], tokens: int = 10) -> dict[str, Any]:
    rows = [{"nll": value * tokens, "tokens": tokens} for value in values]
    return {"test_loss": float(np.mean(values)), "perplexity": 7.0, "rows": rows}


def scores(values: list[float]) -> dict[str, Any]:
    return {"chrf": float(np.mean(values)), "answers": [{"chrf": value} for value in values]}


def test_pairing_finds_a_small_gain_that_all_rows_share() -> None:
    old = [1.0, 5.0, 2.0, 8.0]
    told = compare("test_loss", losses([value - 0.01 for value in old]), losses(old), "version 1")
    assert told.better
    assert "beyond chance: the difference of test_loss is -0.0100 to -0.0100 (95%)" in told.reason


def test_a_gain_of_some_rows_and_a_loss_of_others_is_chance() -> None:
    told = compare("test_loss", losses([1.0, 2.9, 2.0, 3.0]), losses([2.0, 2.0, 3.0, 2.0]), "version 1")
    assert not told.better
    assert "not beyond chance" in told.reason


@pytest.mark.parametrize(("gain", "better"), [(5.0, True), (-5.0, False)])
def test_of_chrf_more_is_better_and_of_losses_less(gain: float, better: bool) -> None:
    old = [20.0, 40.0, 30.0]
    assert compare("chrf", scores([value + gain for value in old]), scores(old), "it").better is better
    assert compare("test_loss", losses([v - gain for v in old]), losses(old), "it").better is better


def test_perplexity_is_judged_by_the_losses_of_the_rows() -> None:
    told = compare("perplexity", losses([1.0, 2.0]), losses([1.5, 2.5]), "it")
    assert told.better
    assert "the difference of loss is" in told.reason


def test_without_the_same_rows_on_both_sides_only_the_means_are_compared_and_that_is_said() -> None:
    plain = {"test_loss": 2.0}
    for rival in (plain, losses([2.0]), losses([2.0, 2.0], tokens=9)):
        told = compare("test_loss", losses([1.0, 1.0]), rival, "version 1")
        assert told.better
        assert "(means alone compared)" in told.reason
    assert not compare("test_loss", plain, plain, "version 1").better


def test_rows_that_have_nothing_to_learn_take_no_part() -> None:
    new, old = losses([1.0, 1.1]), losses([2.0, 2.1])
    for side in (new, old):
        side["rows"].append({"nll": 0.0, "tokens": 0})
    assert compare("test_loss", new, old, "it").better


def test_a_figure_that_is_not_there_is_named_beside_those_that_are() -> None:
    told = compare("blue", {"chrf": 1.0, "test_loss": 2.0, "answers": []}, {"chrf": 1.0}, "it")
    assert not told.better
    assert told.reason == "register.metric = 'blue' was not measured; there are chrf, test_loss"
