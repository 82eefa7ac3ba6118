"""The loop: exact losses, an order that validation cannot disturb, figures of the weights saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import TINY_LLAMA
from mlx.utils import tree_flatten
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
from tasks.train.batches import collate, update_groups, updates_per_epoch
from tasks.train.checkpoints import Checkpoints
from tasks.train.loop import fit, total_steps
from tasks.train.loss import batch_loss, mean_loss
from tasks.train.optimizers import make_optimizer, optimizer_state
from tasks.train.schedules import learning_rate_at
from tasks.train.state import Training
from tasks.train.update import Launched, Updates, dropout_seed


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


def test_dropout_is_a_function_of_seed_and_step_whatever_else_draws(token_rows: TokenRows) -> None:
    def weights(seed: int, draw: bool) -> dict[str, mx.array]:
        settings = TrainSettings(num_layers=2, batch_size=4, dropout=0.3, seed=seed)
        network = tiny_network(settings)

        def disturb(step: int, metrics: Mapping[str, float]) -> None:
            if draw:
                mx.eval(mx.random.normal((5,)))

        return fit(network, token_rows, token_rows, settings, disturb).best_weights

    assert equal(weights(0, draw=False), weights(0, draw=True))
    assert not equal(weights(0, draw=False), weights(1, draw=False))


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


def test_of_a_group_only_the_rows_of_the_broken_batch_are_named(token_rows: TokenRows) -> None:
    settings = TrainSettings(num_layers=2, batch_size=1, accumulation_steps=4)
    network = tiny_network(settings)
    [group] = islice(update_groups(token_rows, 1, 4, seed=0), 1)
    third = group.batches[2]
    group.batches[2] = replace(third, weights=third.weights * math.nan)
    launched = Updates(network, optim.SGD(1.0), settings, 10).launch(group.batches, 1)
    with pytest.raises(StepError, match=rf"rows \[{third.rows.item()}\]"):
        launched.figures()


def test_weights_that_overflow_in_the_update_stop_the_run_although_loss_and_gradient_were_finite(
    token_rows: TokenRows,
) -> None:
    class Overflowing(optim.SGD):
        def update(self, model: nn.Module, gradients: dict[str, object]) -> None:
            model.load_weights([(n, a * math.inf) for n, a in adapter_weights(model).items()], strict=False)

    settings = TrainSettings(num_layers=2)
    [group] = islice(update_groups(token_rows, 4, 1, seed=0), 1)
    network = tiny_network(settings)
    updates = Updates(network, Overflowing(1.0), settings, 10)
    with pytest.raises(StepError, match="step 1: weights that are not finite"):
        updates.launch(group.batches, 1).figures()


def test_a_validation_loss_that_is_not_finite_stops_the_run(token_rows: TokenRows) -> None:
    settings = TrainSettings(num_layers=2, batch_size=4, steps_per_eval=2)
    network = tiny_network(settings)
    odd = TokenRows.from_rows([([310, 311, 312], [False, True, True])])  # tokens of no training row

    def spoil(step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            network.model.embed_tokens.weight[310] = math.inf

    with pytest.raises(StepError, match="validation loss is nan after step 2"):
        fit(network, token_rows, odd, settings, spoil)


def test_validation_rows_without_a_supervised_token_are_refused(token_rows: TokenRows) -> None:
    silent = TokenRows.from_rows([([5, 6, 7], [False, False, False])])
    settings = TrainSettings(num_layers=2)
    with pytest.raises(StepError, match="validation rows have no supervised token"):
        fit(tiny_network(settings), token_rows, silent, settings, lambda *_: None)


@pytest.mark.parametrize("accumulation_steps", [2, 3, 7])
def test_an_accumulated_gradient_equals_that_of_one_big_batch(
    token_rows: TokenRows, accumulation_steps: int
) -> None:
    settings = TrainSettings(num_layers=2, batch_size=2, accumulation_steps=accumulation_steps)
    network = tiny_network(settings)
    # B starts at zero, which would hide A's gradient.
    network.load_weights(
        [(n, mx.full(a.shape, 0.02)) for n, a in adapter_weights(network).items() if n.endswith("lora_b")],
        strict=False,
    )
    updates = Updates(network, optim.SGD(1.0), settings, 10)
    per_epoch = updates_per_epoch(token_rows, 2, accumulation_steps)
    for group in islice(update_groups(token_rows, 2, accumulation_steps, seed=0), per_epoch):
        whole = collate(token_rows, np.concatenate([batch.rows for batch in group.batches]))
        losses, parts = updates.gradient(group.batches, 1)
        [loss], gradient = updates.gradient([whole], 1)
        assert float(sum(losses)) == pytest.approx(float(loss), rel=1e-6)
        assert float(loss) == pytest.approx(batch_loss(network, whole).item(), rel=1e-6)
        for (name, ours), (_, theirs) in zip(tree_flatten(parts), tree_flatten(gradient), strict=True):
            difference = np.abs(np.array(ours) - np.array(theirs)).max()
            assert difference <= 1e-5 * np.abs(np.array(theirs)).max(), name


def test_batches_of_a_group_draw_their_own_dropout() -> None:
    seeds = {dropout_seed(seed, step, place) for seed in (0, 1) for step in (1, 2) for place in (0, 1, 2)}
    assert len(seeds) == 12


def test_without_a_limit_the_gradient_is_not_clipped(token_rows: TokenRows) -> None:
    def step_of(**limit: object) -> tuple[float, float]:
        settings = TrainSettings.model_validate(
            {"num_layers": 2, "warmup_steps": 0, "schedule": "constant", **limit}
        )
        network = tiny_network(settings)
        before = adapter_weights(network)
        [group] = islice(update_groups(token_rows, 4, 1, seed=0), 1)
        metrics = Updates(network, optim.SGD(1.0), settings, 10).launch(group.batches, 1).figures()
        moved = [adapter_weights(network)[name] - before[name] for name in before]
        return metrics["grad_norm"], math.sqrt(sum(mx.square(each).sum().item() for each in moved))

    norm, moved = step_of(max_grad_norm=None, learning_rate=1.0)
    assert moved == pytest.approx(norm, rel=1e-5)
    norm, moved = step_of(max_grad_norm=norm / 2, learning_rate=1.0)
    assert moved == pytest.approx(norm / 2, rel=1e-3)


def test_steps_cover_the_epochs_rounded_up(token_rows: TokenRows) -> None:
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=1)) == 4
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=0.3)) == 2
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=9, max_steps=5)) == 5
    assert total_steps(token_rows, TrainSettings(batch_size=4, epochs=3, accumulation_steps=3)) == 6


def test_a_run_that_ended_says_by_which_setting(token_rows: TokenRows) -> None:
    assert train(token_rows)[1].ended_by == "epochs"
    assert train(token_rows, max_steps=2)[1].ended_by == "max_steps"


def test_a_run_ended_by_minutes_is_the_beginning_of_the_run_without_that_limit(token_rows: TokenRows) -> None:
    _, whole = train(token_rows, epochs=1)
    _, short = train(token_rows, epochs=1, max_minutes=1e-9)
    assert (short.step, short.steps, short.ended_by) == (1, whole.steps, "max_minutes")
    same = ("train_loss", "learning_rate", "grad_norm")
    assert [short.history[1][1][name] for name in same] == [whole.history[1][1][name] for name in same]
    assert short.history[1][1]["val_loss"] == short.best_val_loss, "validated at its end"


def test_minutes_count_over_all_starts(token_rows: TokenRows, tmp_path: Path) -> None:
    settings = TrainSettings(num_layers=2, batch_size=4, epochs=50, steps_per_save=1, max_minutes=10)
    network = tiny_network(settings)
    kept = Checkpoints(tmp_path, settings)
    state = Training(200, 0, 4, 1, step=3, position=3, seconds=10 * 60, peak_memory=99.0)
    state.note({"train_loss": 2.0})
    kept.save(state, adapter_weights(network), optimizer_state(make_optimizer(settings)))
    result = fit(network, token_rows, token_rows, settings, lambda *_: None, kept)
    assert (result.step, result.ended_by, result.best_step) == (3, "max_minutes", 3)
    assert result.seconds > 10 * 60
    assert result.peak_memory == 99.0, "the highest of all starts"


def test_a_run_stopped_before_its_first_update_for_long_still_trains(
    token_rows: TokenRows, tmp_path: Path
) -> None:
    settings = TrainSettings(num_layers=2, batch_size=4, epochs=50, max_minutes=10)
    network = tiny_network(settings)
    kept = Checkpoints(tmp_path, settings)
    state = Training(200, 0, 4, 1, seconds=10 * 60, history=[(0, {"val_loss": 9.0})])
    kept.save(state, adapter_weights(network), optimizer_state(make_optimizer(settings)))
    assert fit(network, token_rows, token_rows, settings, lambda *_: None, kept).step == 1


def test_patience_ends_a_run_that_does_not_gain_and_keeps_its_best(token_rows: TokenRows) -> None:
    changes = {"learning_rate": 1.0, "warmup_steps": 40, "epochs": 10, "steps_per_eval": 2}
    _, endless = train(token_rows, **changes)
    _, result = train(token_rows, patience=2, **changes)
    assert result.ended_by == "patience"
    assert result.step == result.best_step + 4 < endless.step
    assert result.history[-1][1].keys() >= {"val_loss", "train_loss"}
    assert exact_losses(result) == exact_losses(endless)[: result.step + 1]


def exact_losses(result: Training) -> list[float]:
    return [metrics.get("train_loss", 0.0) for _, metrics in result.history]


def test_only_a_fall_of_min_gain_counts_and_small_ones_add_up() -> None:
    def since(min_gain: float, *losses: float) -> int:
        history = [(step, {"val_loss": loss}) for step, loss in enumerate(losses)]
        return Training(9, 0, 1, 1, history=history).validations_without_gain(min_gain)

    assert since(0.0, 3.0, 2.0, 2.5, 2.0) == 2
    assert since(0.0, 3.0, 2.0, 2.5, 1.9) == 0
    assert since(0.5, 3.0, 2.8, 2.6) == 2
    assert since(0.5, 3.0, 2.8, 2.4) == 0


def test_valid_rows_validates_on_the_first_rows(token_rows: TokenRows) -> None:
    network, result = train(token_rows, valid_rows=3)
    network.load_weights(list(result.best_weights.items()), strict=False)
    alone = mean_loss(network, token_rows.first(3), 4, "")
    assert result.best_val_loss == pytest.approx(alone, rel=1e-6)
    assert mean_loss(network, token_rows, 4, "") != pytest.approx(alone, rel=1e-3)


def test_recomputed_activations_give_the_same_training(token_rows: TokenRows) -> None:
    network, plain = train(token_rows)
    kinds = [type(layer) for layer in network.layers]
    network, recomputed = train(token_rows, grad_checkpoint=True)
    assert recomputed.best_val_loss == pytest.approx(plain.best_val_loss, rel=1e-4)
    assert [type(layer) for layer in network.layers] == kinds


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_to_its_peak_and_falls_to_a_tenth_or_stays(schedule: str) -> None:
    settings = TrainSettings.model_validate({"schedule": schedule, "warmup_steps": 5, "learning_rate": 1e-3})
    rates = [learning_rate_at(step, 50, settings) for step in range(1, 51)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 1e-4)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    lower = settings.model_copy(update={"final_lr_share": 0.02})
    assert learning_rate_at(50, 50, lower) == pytest.approx(1e-3 if schedule == "constant" else 2e-5)


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


@pytest.mark.parametrize(
    ("steps_per_eval", "expected"),
    [
        (100, "launch 1 launch 2 read 1 launch 3 read 2 launch 4 read 3 read 4"),
        (2, "launch 1 launch 2 read 1 read 2 launch 3 launch 4 read 3 read 4"),
    ],
)
def test_an_update_is_launched_behind_another_unless_something_is_done_with_the_weights_between(
    token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch, steps_per_eval: int, expected: str
) -> None:
    order: list[str] = []
    launch, figures = Updates.launch, Launched.figures

    def launched(updates: Updates, batches: Any, step: int) -> Launched:
        order.append(f"launch {step}")
        return launch(updates, batches, step)

    def read(update: Launched) -> dict[str, float]:
        order.append(f"read {update.step}")
        return figures(update)

    monkeypatch.setattr(Updates, "launch", launched)
    monkeypatch.setattr(Launched, "figures", read)
    train(token_rows, max_steps=4, steps_per_eval=steps_per_eval)
    assert " ".join(order) == expected
