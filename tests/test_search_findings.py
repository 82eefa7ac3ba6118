"""What a search taught, in figures, words and pictures, from studies whose losses are made up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search.findings import comparable, findings, leaderboard, ranked
from search.plots import draw_study
from search.study import Standing, State, Study, create_study

SPACE = {
    "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
    "rank": CategoricalDistribution((8, 16, 32)),
}


def made_up(name: str, best_rate: float = 1e-4, least_rank: int = 16) -> Study:
    """Twelve trials: the rate decides, ranks below `least_rank` lose a little, two proposals do not fit."""
    study = create_study(name)
    for number in range(12):
        rate = 10 ** (-5 + 2 * number / 11)
        rank = (8, 16, 32)[number % 3]
        loss = 2 + (math.log10(rate) - math.log10(best_rate)) ** 2 / 2 + 0.05 * (rank < least_rank)
        study.add(
            {"learning_rate": rate, "rank": rank}, SPACE, Standing("waiting", 10**9, (3, 9), 0), 2 * 10**9
        )
        done = number % 4 == 0
        state: State = "trained" if done else "pruned"
        losses = ((3, loss), (9, loss - 0.2)) if done else ((3, loss),)
        ended = "epochs" if done else ""
        study.update(number, state=state, val_losses=losses, ended_by=ended, measured_bytes=8 * 10**8)
    for rank in (16, 32):
        over = Standing("over budget", 3 * 10**9, (3, 9), 0, reason="3.00 GB expected, the budget is 2.00 GB")
        study.add({"learning_rate": 1e-4, "rank": rank}, SPACE, over, 2 * 10**9)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("made-up")))
        yield made_up("made-up")


def test_importance_and_sentences_say_what_was_put_in(study: Study) -> None:
    found = findings(study)
    assert found.importance["learning_rate"] > 0.7
    assert sum(found.importance.values()) == pytest.approx(1)
    told = " ".join(found.sentences)
    assert f"Learning rate decided {found.importance['learning_rate']:.0%}" in told
    assert "2 of 14 proposals did not fit the budget and were not started." in told
    assert "12 trials took 54 updates; to their ends they would have taken 108." in told
    assert "end of its range" not in told


def test_values_that_brought_nothing_and_a_best_rate_at_the_end_of_its_range_are_named() -> None:
    told = " ".join(findings(made_up("another", best_rate=1e-6, least_rank=0)).sentences)
    assert "Rank above 8 brought nothing." in told
    assert "The best learning rate is at the lower end of its range" in told


def test_few_trials_have_no_importance() -> None:
    study = create_study("few")
    study.add({"learning_rate": 1e-4, "rank": 8}, SPACE, Standing("waiting", 1, (3,), 0), 10)
    study.update(0, state="trained", val_losses=((3, 2.0),), ended_by="epochs")
    assert findings(study).importance == {}
    assert findings(create_study("none")).sentences == []


def test_trials_are_compared_after_the_same_rows(study: Study) -> None:
    assert [loss for _, loss in comparable(study)] == [
        trial.standing.val_losses[0][1] for trial in study.trials.values() if trial.standing.val_losses
    ]


def test_the_leaderboard_begins_with_the_best_trained_and_ends_with_what_did_not_fit(study: Study) -> None:
    board = leaderboard(study)
    assert board["trial"][0] == study.best().number  # type: ignore[union-attr]
    assert board["state"][-2:] == ["over budget", "over budget"]
    assert board["val_loss"][-1] is None
    assert len({len(column) for column in board.values()}) == 1
    assert [trial.number for trial in ranked(study)] == board["trial"]


def test_every_plot_of_a_study_is_drawn_and_none_of_an_empty_one(study: Study, tmp_path: Path) -> None:
    drawn = draw_study(study, tmp_path)
    assert {path.stem for path in drawn} == {"history", "rungs", "memory", "importance", "slice", "contour"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert draw_study(create_study("empty"), tmp_path) == []


def test_optuna_has_the_same_best(study: Study) -> None:
    best = study.best()
    assert best is not None
    assert study.stored.best_trial.number == best.number
    assert study.stored.best_value == best.val_loss
