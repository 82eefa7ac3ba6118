"""The space: what is fixed, listed or a range, resolved by the model, refused with what it can be."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search.budget import parse_budget
from search.space import check_space, combinations, proposed, search_space
from tasks.config import Settings, load_settings
from tasks.errors import InputError


def settings(*overrides: str) -> Settings:
    return load_settings(None, list(overrides))


def space(*overrides: str, layers: int = 32) -> dict[str, object]:
    return dict(search_space(settings(*overrides).search, layers))


def test_by_default_rate_rank_and_depth_are_searched_and_the_scale_follows_alpha() -> None:
    assert space() == {
        "learning_rate": FloatDistribution(3e-5, 1e-3, log=True),
        "rank": CategoricalDistribution((8, 16, 32, 64)),
        "num_layers": CategoricalDistribution((4, 8, 16, 32)),
    }
    train = proposed(settings(), {"learning_rate": 1e-4, "rank": 64, "num_layers": 8}, 32)
    assert (train.learning_rate, train.rank, train.num_layers) == (1e-4, 64, 8)
    assert train.alpha == 32
    assert train.scale is None
    assert train.frozen_prefix == "always"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("learning_rate=[1e-4, 3e-4]", CategoricalDistribution((1e-4, 3e-4))),
        ("rank={low: 4, high: 64, log: true}", IntDistribution(4, 64, log=True)),
        ("num_layers={low: 2, high: 6}", IntDistribution(2, 6)),
        ("alpha=[8, 16, 32]", CategoricalDistribution((8.0, 16.0, 32.0))),
        ("scale={low: 0.5, high: 8, log: true}", FloatDistribution(0.5, 8, log=True)),
        ("dropout={low: 0, high: 0.2}", FloatDistribution(0, 0.2)),
        ("batch_size=[2, 4]", CategoricalDistribution((2, 4))),
        ("epochs=[1, 3]", CategoricalDistribution((1.0, 3.0))),
        ("targets=['q_proj,v_proj', attention]", CategoricalDistribution(("q_proj,v_proj", "attention"))),
    ],
)
def test_every_parameter_may_be_a_list_or_a_range(given: str, expected: object) -> None:
    assert space(f"search.{given}")[given.partition("=")[0]] == expected


def test_what_is_fixed_is_laid_over_the_training_and_not_searched() -> None:
    given = ["search.learning_rate=5e-4", "search.rank=[16]", "search.num_layers=L/4", "search.dropout=0.1"]
    assert space(*given) == {}
    train = proposed(settings(*given), {}, 32)
    assert (train.learning_rate, train.rank, train.num_layers, train.dropout) == (5e-4, 16, 8, 0.1)


def test_modules_are_chosen_as_a_whole() -> None:
    wanted = settings("search.targets=['q_proj, v_proj', attention]")
    params = {"learning_rate": 1e-4, "rank": 8, "num_layers": 4, "targets": "q_proj, v_proj"}
    assert proposed(wanted, params, 32).targets == ("q_proj", "v_proj")


def test_other_settings_stay_and_never_stays_never() -> None:
    wanted = settings("train.batch_size=7", "train.frozen_prefix=never")
    train = proposed(wanted, {"learning_rate": 1e-4, "rank": 8, "num_layers": -1}, 32)
    assert (train.batch_size, train.frozen_prefix, train.num_layers) == (7, "never", -1)


def test_shares_of_a_shallow_model_that_are_the_same_number_stand_once() -> None:
    assert space(layers=4)["num_layers"] == CategoricalDistribution((1, 2, 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("search.learning_rate.low=2e-3", "search.learning_rate: low (0.002) must be below high (0.001)"),
        ("search.learning_rate=[3]", "less than or equal to 1"),
        ("search.rank=[]", "give at least one value"),
        ("search.rank=[8, 8]", "a value stands twice"),
        ("search.rank=[0]", "search.rank.0 = 0"),
        ("search.rank={low: 4}", "search.rank.high"),
        ("search.dropout={low: 0, high: 0.5, log: true}", "above 0 on a log scale"),
        ("search.num_layers=[L/x]", "a share of the model's L layers: L/8"),
        ("search.num_layers=[0]", "-1 for all"),
        ("search.objectives=[memory]", "objectives begin with loss or a score"),
        ("search.objectives=[chrf]", "set rungs=none"),
        ("search.objectives=[loss, time]", "set rungs=none"),
        ("search.time=tonight", "search.time = 'tonight'"),
    ],
)
def test_wrong_spaces_are_refused_by_name_and_value(given: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        settings(given)
    assert message in str(refused.value)


def test_a_score_of_answers_needs_answers() -> None:
    with pytest.raises(InputError, match=r"chrf is a score of answers, and evaluate\.samples is 0"):
        settings("search.objectives=[loss, chrf]", "search.rungs=none", "evaluate.samples=0")


def test_alpha_and_scale_together_are_refused() -> None:
    with pytest.raises(InputError, match="scale is used in place of alpha"):
        settings("search.alpha=[8, 16]", "search.scale=[1, 2]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["search.num_layers=[4, 48]"], "holds 48: the model has 32 layers; give numbers up to 32"),
        (["search.num_layers={low: 1, high: 33}"], "holds 33: the model has 32 layers"),
        (["train.max_minutes=5"], "train.max_minutes = 5"),
        (["train.from_adapter=somewhere"], "chooses rank and layers"),
        (
            ["search.batch_size=[2, 4]", "train.max_steps=20"],
            "search.batch_size varies and train.max_steps = 20",
        ),
        (["search.epochs=[1, 2]", "train.max_steps=20"], "search.epochs varies and train.max_steps = 20"),
        (["train.method=full"], "search.rank: train.method full has no rank"),
    ],
)
def test_a_space_that_model_or_training_do_not_have_is_refused_before_the_first_trial(
    given: list[str], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_space(settings(*given), layers_in_model=32)
    assert message in str(refused.value)


def test_the_default_space_and_all_layers_are_fit_for_any_model() -> None:
    for layers in (1, 4, 32):
        check_space(settings("search.num_layers=[-1, 1, L]"), layers)
        check_space(settings(), layers)


def test_proposals_of_a_finite_space_are_counted() -> None:
    assert combinations(search_space(settings("search.learning_rate=[1e-4, 2e-4]").search, 32)) == 32
    assert combinations(search_space(settings().search, 32)) == float("inf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), ("75%", 750), (" 1.5 gb ", 15 * 10**8)],
)
def test_budgets_are_amounts_or_shares(text: str, expected: int) -> None:
    assert parse_budget(text, free_bytes=1000) == expected


@pytest.mark.parametrize("text", ["", "8", "GB", "-1GB", "0GB", "120%", "8 parsecs", "8TB"])
def test_other_budgets_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="such as 8GB"):
        parse_budget(text, free_bytes=1000)
