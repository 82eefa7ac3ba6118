"""The loop: exact losses, an order that validation cannot disturb, figures of the weights saved."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY_LLAMA
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import default_loss

from tasks.config import TrainSettings
from tasks.errors import InputError, StepError
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import (
    adapter_config,
    adapter_weights,
    add_adapter,
    load_adapter,
    save_adapter,
)
from tasks.train.batches import collate
from tasks.train.loop import Training, fit, total_steps
from tasks.train.loss import batch_loss, mean_loss
from tasks.train.schedules import learning_rate_at


def tiny_network(settings: TrainSettings | None = None) -> Model:
    """The same random network every time, with an adapter when settings are given."""
    mx.random.seed(11)
    network = Model(ModelArgs.from_dict(TINY_LLAMA))
    mx.eval(network.parameters())
    if settings:
        add_adapter(network, adapter_config(settings, 4), settings.seed)
    return network


def train(rows: TokenRows, **changes: object) -> tuple[Model, Training]:
    settings = TrainSettings.model_validate(
        {"num_layers": 2, "rank": 4, "learning_rate": 1e-2, "batch_size": 4, "epochs": 3, **changes}
    )
    network = tiny_network(settings)
    return network, fit(network, rows, rows, settings, lambda step, metrics: None)


def equal(left: dict[str, mx.array], right: dict[str, mx.array]) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(np.array(left[name]), np.array(right[name])) for name in left
    )


def test_batch_loss_equals_mlx_lms_on_a_batch_without_padding() -> None:
    network = tiny_network()
    tokens = np.random.default_rng(0).integers(3, 300, (3, 12))
    rows = TokenRows.from_rows([(row.tolist(), [place >= 5 for place in range(12)]) for row in tokens])
    batch = collate(rows, np.arange(3))
    ours = batch_loss(network, batch).item()
    # mlx-lm's spans are 1-based (offset, length) of the targets and include both ends.
    theirs, count = default_loss(network, mx.array(tokens), mx.array([[5, 11]] * 3))
    assert count.item() == batch.supervised_tokens == 21
    assert ours == pytest.approx(theirs.item(), rel=1e-6)


def test_mean_loss_weights_tokens_not_batches(token_rows: TokenRows) -> None:
    network = tiny_network()
    one_by_one = mean_loss(network, token_rows, 1, "")
    assert mean_loss(network, token_rows, 4, "") == pytest.approx(one_by_one, rel=1e-5)
    assert mean_loss(network, token_rows, 13, "") == pytest.approx(one_by_one, rel=1e-5)


def test_training_lowers_the_loss_and_equal_runs_give_equal_bytes(token_rows: TokenRows) -> None:
    _, first = train(token_rows)
    _, second = train(token_rows)
    assert first.best_val_loss < 0.9 * first.val_loss_before
    assert equal(first.best_weights, second.best_weights)


def test_dropout_is_a_function_of_seed_and_step(token_rows: TokenRows) -> None:
    _, first = train(token_rows, dropout=0.3)
    mx.random.normal((5,))
    _, second = train(token_rows, dropout=0.3)
    _, other = train(token_rows, dropout=0.3, seed=1)
    assert equal(first.best_weights, second.best_weights)
    assert not equal(first.best_weights, other.best_weights)


def test_validating_more_often_does_not_change_training(token_rows: TokenRows) -> None:
    often, _ = train(token_rows, steps_per_eval=1, dropout=0.2)
    seldom, _ = train(token_rows, steps_per_eval=1000, dropout=0.2)
    assert equal(adapter_weights(often), adapter_weights(seldom))


def test_best_val_loss_is_that_of_the_weights_saved(token_rows: TokenRows) -> None:
    network, result = train(token_rows, steps_per_eval=2, learning_rate=0.3)
    network.load_weights(list(result.best_weights.items()), strict=False)
    assert mean_loss(network, token_rows, 4, "") == pytest.approx(result.best_val_loss, rel=1e-6)
    values = [metrics["val_loss"] for step, metrics in result.history if step and "val_loss" in metrics]
    assert result.best_val_loss == min(values)


def test_history_has_every_step_and_mlx_lms_names(token_rows: TokenRows) -> None:
    _, result = train(token_rows)
    assert [step for step, _ in result.history] == list(range(13))
    wanted = {
        "train_loss", "learning_rate", "tokens_per_second", "iterations_per_second",
        "trained_tokens", "peak_memory", "grad_norm", "epoch",
    }  # fmt: skip
    assert wanted <= result.history[1][1].keys()
    assert result.history[-1][1]["trained_tokens"] == 3 * token_rows.supervised.sum()


def test_a_loss_that_is_not_finite_stops_at_once_and_names_step_and_rows(token_rows: TokenRows) -> None:
    settings = TrainSettings(num_layers=2, batch_size=4)
    network = tiny_network(settings)
    network.model.layers[3].mlp.down_proj.linear.weight[0, 0] = math.nan
    with pytest.raises(StepError, match=r"step 1: loss nan.*rows \["):
        fit(network, token_rows, token_rows, settings, lambda step, metrics: None)


def test_rows_without_a_supervised_token_are_refused_instead_of_looping_forever() -> None:
    rows = TokenRows.from_rows([([5, 6, 7], [False, False, False])] * 4)
    with pytest.raises(StepError, match="no supervised token"):
        train(rows)


def test_steps_cover_the_epochs_rounded_up(token_rows: TokenRows) -> None:
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=1)) == 4
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=0.3)) == 2
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=9, max_steps=5)) == 5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_to_its_peak_and_falls_to_a_tenth_or_stays(schedule: str) -> None:
    settings = TrainSettings.model_validate({"schedule": schedule, "warmup_steps": 5, "learning_rate": 1e-3})
    rates = [learning_rate_at(step, 50, settings) for step in range(1, 51)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 1e-4)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


def test_saved_adapter_is_read_by_mlx_lm_and_by_us_alike(tmp_path: Path, token_rows: TokenRows) -> None:
    from mlx_lm.tuner.utils import load_adapters

    network, result = train(token_rows)
    save_adapter(tmp_path, result.best_weights, adapter_config(TrainSettings(num_layers=2, rank=4), 4))
    tokens = mx.array([[5, 6, 7, 8, 9]])
    network.load_weights(list(result.best_weights.items()), strict=False)
    network.eval()
    expected = np.array(network(tokens))
    ours, theirs = tiny_network(), tiny_network()
    load_adapter(ours, tmp_path)
    load_adapters(theirs, str(tmp_path)).eval()
    assert np.array_equal(np.array(ours(tokens)), expected)
    assert np.array_equal(np.array(theirs(tokens)), expected)


def spoil_missing(weights: dict[str, mx.array]) -> None:
    del weights[min(weights)]


def spoil_shape(weights: dict[str, mx.array]) -> None:
    weights[min(weights)] = mx.zeros((3, 3))


def spoil_infinite(weights: dict[str, mx.array]) -> None:
    name = min(weights)
    weights[name] = mx.full(weights[name].shape, math.inf)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(spoil_missing, "missing or unknown"), (spoil_shape, "expected"), (spoil_infinite, "NaN or infinity")],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, spoil: object, message: str) -> None:
    settings = TrainSettings(num_layers=2, rank=4)
    weights = adapter_weights(tiny_network(settings))
    assert callable(spoil)
    spoil(weights)
    save_adapter(tmp_path, weights, adapter_config(settings, 4))
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_network(), tmp_path)


def test_a_folder_without_an_adapter_and_other_kinds_of_tuning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_adapter(tiny_network(), tmp_path)
    config = adapter_config(TrainSettings(num_layers=2), 4) | {"fine_tune_type": "magic"}
    save_adapter(tmp_path, adapter_weights(tiny_network(TrainSettings(num_layers=2))), config)
    with pytest.raises(InputError, match="fine_tune_type = 'magic'"):
        load_adapter(tiny_network(), tmp_path)


def test_more_layers_than_the_model_has_are_refused_and_minus_one_means_all() -> None:
    with pytest.raises(InputError, match="the model has 4 layers"):
        adapter_config(TrainSettings(num_layers=5), 4)
    assert adapter_config(TrainSettings(num_layers=-1), 4)["num_layers"] == 4


def test_a_new_adapter_leaves_the_model_as_it_was_and_depends_on_its_seed() -> None:
    tokens = mx.array([[5, 6, 7, 8, 9]])
    plain, adapted = tiny_network(), tiny_network(TrainSettings(num_layers=2))
    assert np.array_equal(np.array(plain(tokens)), np.array(adapted(tokens)))
    mx.random.seed(99)
    again = tiny_network(TrainSettings(num_layers=2))
    other = tiny_network(TrainSettings(num_layers=2, seed=5))
    assert equal(adapter_weights(adapted), adapter_weights(again))
    assert not equal(adapter_weights(adapted), adapter_weights(other))
    assert isinstance(adapted, nn.Module)
