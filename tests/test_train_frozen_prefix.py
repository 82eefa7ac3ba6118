"""Training and measuring on a prefix that is computed once equal the plain ones, where that pays."""

from __future__ import annotations

import errno
import shutil
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_networks import CONFIGS, tiny_network

from tasks.config import EvaluateSettings, TrainSettings
from tasks.evaluate.measure import Pair, measure
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train import frozen_prefix, prefix_cache
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.batches import update_groups
from tasks.train.frozen_prefix import (
    for_measuring,
    frozen_depth,
    record_prefixes,
    untouched_layers,
    without_frozen_layers,
)
from tasks.train.loop import fit
from tasks.train.loss import mean_loss
from tasks.train.prefix_cache import PrefixedRows
from tasks.train.substitution import layers_of
from tasks.train.trial_prefixes import record_for_trials

KINDS = [kind for kind in CONFIGS if kind != "rwkv7"]
IDENTITY = {"base": "b"}


def settings_of(**changes: object) -> TrainSettings:
    given = {"num_layers": 2, "rank": 4, "learning_rate": 1e-2, "batch_size": 4, "epochs": 3}
    return TrainSettings.model_validate({**given, "steps_per_eval": 5, **changes})


def with_adapter(settings: TrainSettings, kind: str = "llama", seed: int = 0) -> nn.Module:
    network = tiny_network(kind, seed=seed)
    add_adapter(network, adapter_config(settings, len(network.layers)), settings.seed)
    return network


def splits_of(rows: TokenRows) -> dict[str, TokenRows]:
    return {"train": rows, "valid": rows.first(6)}


def taken_out(rows: TokenRows, settings: TrainSettings) -> set[str]:
    """The splits whose rows bring their hidden states."""
    splits = without_frozen_layers(with_adapter(settings), splits_of(rows), settings, IDENTITY)
    return {name for name, rows in splits.items() if isinstance(rows, PrefixedRows)}


def losses(rows: TokenRows, settings: TrainSettings, kind: str = "llama") -> list[float]:
    network = with_adapter(settings, kind)
    splits = without_frozen_layers(network, splits_of(rows), settings, IDENTITY)
    training = fit(network, splits["train"], splits["valid"], settings, lambda step, metrics: None)
    return [value for _, at in training.history for name, value in at.items() if name.endswith("_loss")]


def plain_losses(rows: TokenRows, settings: TrainSettings, kind: str = "llama") -> list[float]:
    return losses(rows, settings.model_copy(update={"frozen_prefix": "never"}), kind)


def caches(home: Path) -> list[Path]:
    folder = home / "cache" / "prefix"
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


@pytest.fixture
def layer_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of any Llama layer, as it happens."""
    from mlx_lm.models.llama import TransformerBlock

    calls: list[int] = []
    call = TransformerBlock.__call__

    def counted(self: nn.Module, hidden: mx.array, *args: object, **kwargs: object) -> mx.array:
        calls.append(hidden.shape[0])
        return call(self, hidden, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "__call__", counted)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_frozen_prefix_equals_plain_training(
    kind: str, token_rows: TokenRows, home: Path
) -> None:
    plain = losses(token_rows, settings_of(frozen_prefix="never"), kind)
    assert not caches(home)
    prefixed = losses(token_rows, settings_of(frozen_prefix="always"), kind)
    assert len(caches(home)) == 2
    assert prefixed[:2] == pytest.approx(plain[:2], rel=1e-6)  # before the first update
    assert prefixed == pytest.approx(plain, rel=1e-4)


def test_a_model_whose_layers_hand_on_more_than_hidden_states_is_trained_plainly(
    token_rows: TokenRows, caplog: pytest.LogCaptureFixture
) -> None:
    settings, splits = settings_of(frozen_prefix="always"), splits_of(token_rows.first(3))
    network = with_adapter(settings, "rwkv7")
    layers = list(network.layers)
    assert without_frozen_layers(network, splits, settings, IDENTITY) is splits
    assert all(a is b for a, b in zip(network.layers, layers, strict=True))
    assert "the frozen layers run each time for the train and valid rows" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2},
        {"accumulation_steps": 2},
        {"grad_checkpoint": True},
        {"grad_checkpoint": True, "epochs": 1, "frozen_prefix": "auto"},
        {"method": "dora"},
        {"method": "full"},
        {"num_layers": 4},
        {"num_layers": -1},
        {"valid_rows": 3},
        {"max_steps": 2, "seed": 3},
        {"max_steps": 1, "accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_frozen_prefix_changes_no_other_setting(changes: dict[str, object], token_rows: TokenRows) -> None:
    settings = settings_of(**{"frozen_prefix": "always", **changes})
    assert losses(token_rows, settings) == pytest.approx(plain_losses(token_rows, settings), rel=1e-4)


def test_rows_without_a_cache_are_trained_on_beside_rows_with_one(token_rows: TokenRows) -> None:
    settings = settings_of(epochs=1, steps_per_eval=1)
    assert taken_out(token_rows, settings) == {"valid"}
    assert losses(token_rows, settings) == pytest.approx(plain_losses(token_rows, settings), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"epochs": 3}, "train valid"),
        ({"epochs": 1}, "valid"),
        ({"epochs": 3, "max_steps": 4}, "valid"),
        ({"epochs": 1, "frozen_prefix": "always"}, "train valid"),
        ({"epochs": 3, "frozen_prefix": "never"}, ""),
        ({"epochs": 3, "num_layers": 4}, ""),
        ({"epochs": 3, "method": "soft-prompt"}, ""),
    ],
    ids=str,
)
def test_each_split_is_kept_where_that_pays(
    changes: dict[str, object], used: str, token_rows: TokenRows, home: Path
) -> None:
    assert taken_out(token_rows, settings_of(**changes)) == set(used.split())
    assert len(caches(home)) == len(used.split())


def test_the_reason_why_rows_are_not_kept_is_said(
    token_rows: TokenRows, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        taken_out(token_rows, settings_of(epochs=1))
    assert "run in every step for the train rows: used too seldom to keep" in caplog.text


def test_the_frozen_layers_leave_the_memory_only_when_no_split_needs_them(token_rows: TokenRows) -> None:
    for epochs, kept in ((1, True), (3, False)):
        settings = settings_of(epochs=epochs)
        network = with_adapter(settings)
        without_frozen_layers(network, splits_of(token_rows), settings, IDENTITY)
        names = dict(nn.utils.tree_flatten(network.parameters()))
        assert any("layers.0." in name or "layers.1." in name for name in names) is kept


@pytest.mark.parametrize(
    ("changes", "rows"), [({"valid_rows": 3}, 3), ({"valid_rows": 99}, 6), ({}, 6)], ids=str
)
def test_only_rows_that_are_validated_are_recorded(
    changes: dict[str, object], rows: int, token_rows: TokenRows
) -> None:
    settings = settings_of(epochs=1, **changes)
    splits = without_frozen_layers(with_adapter(settings), splits_of(token_rows), settings, IDENTITY)
    assert isinstance(valid := splits["valid"], PrefixedRows)
    assert len(valid.prefix.hidden) == token_rows.offsets[rows]


def test_of_less_than_an_epoch_only_the_rows_trained_on_are_recorded(token_rows: TokenRows) -> None:
    settings = settings_of(frozen_prefix="always", max_steps=2)
    groups = islice(update_groups(token_rows, 4, 1, settings.seed), 2)
    trained = np.concatenate([group.batches[0].rows for group in groups])
    splits = without_frozen_layers(with_adapter(settings), splits_of(token_rows), settings, IDENTITY)
    assert isinstance(train := splits["train"], PrefixedRows)
    assert np.flatnonzero(train.starts >= 0).tolist() == sorted(trained)


def test_rows_that_teach_nothing_are_not_recorded(token_rows: TokenRows) -> None:
    supervised = token_rows.supervised.copy()
    supervised[: token_rows.offsets[2]] = False
    rows = TokenRows(token_rows.tokens, token_rows.offsets, supervised)
    splits = without_frozen_layers(with_adapter(settings_of()), splits_of(rows), settings_of(), IDENTITY)
    assert isinstance(train := splits["train"], PrefixedRows)
    assert np.flatnonzero(train.starts < 0).tolist() == [0, 1]


def test_the_adapter_s_names_are_those_of_the_whole_model(token_rows: TokenRows) -> None:
    for epochs in (1, 3):  # with the frozen layers in place, and without
        settings = settings_of(epochs=epochs)
        network = with_adapter(settings, "qwen3")
        names = adapter_weights(network).keys()
        without_frozen_layers(network, splits_of(token_rows), settings, IDENTITY)
        assert adapter_weights(network).keys() == names


def test_a_cache_of_other_weights_is_noticed_and_not_used(
    token_rows: TokenRows, caplog: pytest.LogCaptureFixture
) -> None:
    settings, splits = settings_of(), splits_of(token_rows)
    for seed in (0, 1):  # another model, the same identity
        network = with_adapter(settings, seed=seed)
        layers = list(network.layers)
        found = without_frozen_layers(network, splits, settings, IDENTITY)
    assert found is splits
    assert all(a is b for a, b in zip(network.layers, layers, strict=True))
    assert "log-probabilities differ" in caplog.text


def test_of_two_splits_the_damaged_one_is_noticed_and_the_other_used(
    token_rows: TokenRows, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert taken_out(token_rows, settings_of()) == {"train", "valid"}
    smaller = min(caches(home), key=lambda path: (path / "hidden").stat().st_size)
    values = np.memmap(smaller / "hidden", np.float32, "r+")
    values[:] = values[::-1].copy()
    values.flush()
    assert taken_out(token_rows, settings_of()) == {"train"}
    assert "for the valid rows, which is slower: log-probabilities differ" in caplog.text


@pytest.mark.parametrize("fault", ["limit", "disk"])
def test_without_room_the_layers_stay(
    fault: str, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(**({"prefix_cache_gb": 1e-6} if fault == "limit" else {}))
    if fault == "disk":
        usage = shutil._ntuple_diskusage(10, 10, 0)
        monkeypatch.setattr("tasks.train.prefix_room.shutil.disk_usage", lambda path: usage)
    network, splits = with_adapter(settings), splits_of(token_rows)
    assert without_frozen_layers(network, splits, settings, IDENTITY) is splits
    assert ("prefix_cache_gb" if fault == "limit" else "are free") in caplog.text


def test_with_room_for_one_split_the_smaller_is_kept(token_rows: TokenRows) -> None:
    room = token_rows.offsets[6] * 32 * 4 / 1e9
    assert taken_out(token_rows, settings_of(prefix_cache_gb=1.01 * room)) == {"valid"}


def test_a_disk_that_fills_up_in_mid_build_leaves_plain_training_and_nothing_else(
    token_rows: TokenRows, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_cache, "_write", full)
    assert losses(token_rows, settings_of()) == plain_losses(token_rows, settings_of())
    assert "No space left on device" in caplog.text
    assert not caches(home)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_after_recording_for_a_search_no_trial_builds_anything(
    mode: str, token_rows: TokenRows, layer_calls: list[int], home: Path
) -> None:
    settings, splits = settings_of(frozen_prefix=mode), splits_of(token_rows)
    record_prefixes(tiny_network("llama"), splits, settings, [1, 2, 3, 4, -1], IDENTITY)
    # One pass over each split, through the layers up to the deepest.
    assert [rows for rows in layer_calls if rows > 1] == [6] * 3 + [13] * 3
    assert len(caches(home)) == 2 * 3
    for num_layers in (1, 2, 3):
        layer_calls.clear()
        trial = settings.model_copy(update={"num_layers": num_layers})
        found = without_frozen_layers(with_adapter(trial), splits, trial, IDENTITY)
        assert all(isinstance(rows, PrefixedRows) for rows in found.values())
        # One token's shape is asked for, two rows are compared, and nothing else is computed.
        assert set(layer_calls) == {1, frozen_prefix.PROBE_ROWS}
    assert len(caches(home)) == 2 * 3


def test_where_not_all_depths_of_a_search_fit_the_deepest_are_kept(token_rows: TokenRows, home: Path) -> None:
    valid, train = (int(token_rows.offsets[rows]) * 32 * 4 / 1e9 for rows in (6, 13))
    settings = settings_of(prefix_cache_gb=3 * valid + 2.1 * train)
    record_prefixes(tiny_network("llama"), splits_of(token_rows), settings, [1, 2, 3], IDENTITY)
    kept = [(path / "inputs.json").read_text() for path in caches(home)]
    assert sorted(text.count('"depth": 1') for text in kept if '"train"' in text) == [0, 0]
    assert len(kept) == 3 + 2


def test_a_search_records_from_the_folders_of_base_and_data(
    tiny_model: ModelFolder, token_rows: TokenRows, tmp_path: Path, home: Path
) -> None:
    save_splits(tmp_path, {"train": token_rows, "valid": token_rows.first(6), "test": token_rows.first(2)})
    record_for_trials(settings_of(), tiny_model, StepOutput(tmp_path, "data", False, 0.0), [1, 3])
    assert len(caches(home)) == 2 * 2


def test_a_search_over_a_model_that_does_not_fit_records_nothing_and_says_so(
    token_rows: TokenRows, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefix_cache, "STORED", {})
    record_prefixes(tiny_network("llama"), splits_of(token_rows), settings_of(), [1, 2], IDENTITY)
    assert not caches(home)
    assert "its hidden states are" in caplog.text


def tuned(settings: TrainSettings) -> nn.Module:
    network = with_adapter(settings)
    network.update(nn.utils.tree_map(lambda array: array + 0.05, network.trainable_parameters()))
    return network


def test_losses_measured_beside_each_other_are_the_plain_ones_from_one_recording(
    token_rows: TokenRows, layer_calls: list[int], home: Path
) -> None:
    settings, found = settings_of(), []
    for network in (tiny_network("llama"), tuned(settings)):
        plain = mean_loss(network, token_rows, 4, "plain")
        layers = list(layers_of(network))
        layer_calls.clear()
        with for_measuring(network, token_rows, 2, settings, IDENTITY) as rows:
            assert isinstance(rows, PrefixedRows)
            found.append(mean_loss(network, rows, 4, "on the prefix"))
        assert found[-1] == pytest.approx(plain, rel=1e-6)
        assert all(a is b for a, b in zip(layers_of(network), layers, strict=True))
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    assert len(caches(home)) == 1
    assert len(token_rows) not in layer_calls  # the second recorded nothing


@pytest.mark.parametrize(("depth", "mode"), [(0, "always"), (2, "never")])
def test_losses_are_measured_plainly_where_no_layer_is_shared_or_none_is_to_be(
    depth: int, mode: str, token_rows: TokenRows, home: Path
) -> None:
    settings = settings_of(frozen_prefix=mode)
    with for_measuring(tiny_network("llama"), token_rows, depth, settings, IDENTITY) as rows:
        assert rows is token_rows
    assert not caches(home)


@pytest.mark.parametrize(
    ("changes", "recorded"),
    [({}, 1), ({"frozen_prefix": "never"}, 0), ({"method": "soft-prompt"}, 0)],
    ids=str,
)
def test_an_evaluation_records_the_test_rows_once_for_base_and_tuned(
    changes: dict[str, object],
    recorded: int,
    tiny_model: ModelFolder,
    token_rows: TokenRows,
    tmp_path: Path,
    home: Path,
) -> None:
    from tasks.models.load import load_model

    network, settings = load_model(tiny_model.path).model, settings_of(**changes)
    config = adapter_config(settings, len(network.layers))
    add_adapter(network, config, seed=0)
    network.update(nn.utils.tree_map(lambda array: array + 0.05, network.trainable_parameters()))
    save_adapter(tmp_path, adapter_weights(network), config)
    save_splits(tmp_path, dict.fromkeys(("train", "valid", "test"), token_rows))
    output = StepOutput(tmp_path, "made", False, 0.0)
    for adapter in (None, output):
        plain, shared = (
            measure(
                EvaluateSettings(samples=0, batch_size=size, general_rows=0),
                tiny_model,
                adapter,
                output,
                pair=pair,
            )
            for size, pair in ((5, None), (4, Pair(tmp_path, settings)))
        )
        loss = shared.read_json("evaluation.json")["test_loss"]
        assert loss == pytest.approx(plain.read_json("evaluation.json")["test_loss"], rel=1e-6)
    assert len(caches(home)) == recorded


def test_what_is_trained_at_the_bottom_leaves_no_prefix() -> None:
    assert frozen_depth(settings_of(), 4) == 2
    assert frozen_depth(settings_of(num_layers=-1), 4) == 0
    assert frozen_depth(settings_of(method="soft-prompt"), 4) == 0


@pytest.mark.parametrize("method", ["lora", "dora", "full", "soft-prompt"])
@pytest.mark.parametrize("num_layers", [1, 3, -1])
def test_a_finished_adapter_leaves_the_layers_alone_that_its_training_froze(
    method: str, num_layers: int
) -> None:
    settings = settings_of(method=method, num_layers=num_layers)
    assert untouched_layers(adapter_config(settings, 4), 4) == frozen_depth(settings, 4)
