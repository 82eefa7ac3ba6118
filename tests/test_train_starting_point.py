"""`train.from_adapter`: training goes on with an adapter there is, and says when settings contradict it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from peft_folders import peft_tensors, write_peft_folder

from flows.cli import run as command
from flows.resume import settings_as_yaml
from search.space import check_space
from tasks.config import Settings, TrainSettings, load_settings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.tracking import Run
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.starting_point import begin_from, check_starting_point, take_weights
from tasks.train.step import train_adapter
from tasks.train.targets import target_keys


class Unrecorded:
    """As much of a run as training asks for."""

    id = "1234"

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def tag(self, name: str) -> str | None:
        """None is set."""
        return None

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def log_files(self, folder: Path, artifact_path: str, only: object = None) -> None:
        """Nothing is kept."""


@pytest.fixture
def data(tmp_path: Path, token_rows: TokenRows) -> StepOutput:
    folder = tmp_path / "data"
    folder.mkdir()
    save_splits(folder, dict.fromkeys(("train", "valid", "test"), token_rows))
    return StepOutput(folder, "data", False, 0.0)


def settings_of(**changes: object) -> TrainSettings:
    return TrainSettings.model_validate({"max_steps": 2, "epochs": 9, "learning_rate": 1e-3, **changes})


def trained(model: ModelFolder, data: StepOutput, **changes: object) -> StepOutput:
    return train_adapter(settings_of(**changes), model, data, cast("Run", Unrecorded()))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    loaded = cast("dict[str, mx.array]", mx.load(str(folder / "adapters.safetensors")))
    return {name: np.array(array) for name, array in loaded.items()}


def saved(folder: Path, model: ModelFolder, **changes: object) -> Path:
    """An adapter in mlx-lm's layout that has done something."""
    settings = settings_of(**changes)
    network = load_model(model.path).model
    keys = target_keys(network, settings.targets, settings.num_layers)
    config = adapter_config(settings, 4, keys)
    add_adapter(network, config, settings.seed)
    folder.mkdir()
    save_adapter(folder, {name: each + 0.02 for name, each in adapter_weights(network).items()}, config)
    return folder


@pytest.mark.parametrize("method", ["lora", "dora", "full", "soft-prompt"])
def test_training_begins_with_the_loss_that_the_adapter_has(
    tmp_path: Path, tiny_model: ModelFolder, data: StepOutput, method: str
) -> None:
    first = trained(tiny_model, data, method=method, num_layers=2, prompt_tokens=4)
    given = {"method": method} if method in ("full", "soft-prompt") else {}
    then = trained(tiny_model, data, from_adapter=str(first.path), **given)
    before, after = first.read_json("training.json"), then.read_json("training.json")
    assert after["val_loss_before"] == pytest.approx(before["best_val_loss"], rel=1e-6)
    assert after["best_val_loss"] < before["best_val_loss"]
    assert weights_of(first.path).keys() == weights_of(then.path).keys()
    config = (then.path / "adapter_config.json").read_text()
    assert config == (first.path / "adapter_config.json").read_text()


def test_an_adapter_of_pefts_is_trained_on(tmp_path: Path, tiny_model: ModelFolder, data: StepOutput) -> None:
    tensors = {name: 0.1 * array for name, array in peft_tensors().items()}
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    folder = write_peft_folder(tmp_path / "theirs", half)
    output = trained(tiny_model, data, from_adapter=str(folder))
    told = output.read_json("training.json")
    assert told["inputs"]["settings"]["targets"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert told["inputs"]["settings"]["dropout"] == 0.05
    assert told["best_val_loss"] < told["val_loss_before"]
    assert {array.dtype for array in weights_of(output.path).values()} == {np.dtype(np.float32)}


def test_another_adapter_is_another_training_and_another_place_of_it_is_not(
    tmp_path: Path, tiny_model: ModelFolder, data: StepOutput
) -> None:
    folder = saved(tmp_path / "one", tiny_model, num_layers=2)
    first = trained(tiny_model, data, from_adapter=str(folder))
    folder.rename(tmp_path / "two")
    again = trained(tiny_model, data, from_adapter=str(tmp_path / "two"))
    assert again.reused
    assert "two" not in (first.path / "training.json").read_text()
    other = saved(tmp_path / "three", tiny_model, num_layers=2, seed=4)
    assert not trained(tiny_model, data, from_adapter=str(other)).reused, "other weights, equal settings"


def test_what_is_not_set_is_taken_from_the_adapter(tmp_path: Path, tiny_model: ModelFolder) -> None:
    folder = saved(tmp_path / "a", tiny_model, rank=3, num_layers=-1, targets=["q_proj"], dropout=0.1)
    taken, adapter = begin_from(settings_of(from_adapter=str(folder)), tiny_model)
    assert adapter == folder
    assert (taken.rank, taken.num_layers, taken.targets) == (3, 4, ("self_attn.q_proj",))
    assert (taken.scale, taken.dropout) == (pytest.approx(32 / 3), 0.1)
    mine, _ = begin_from(settings_of(from_adapter=str(folder), dropout=0.3, num_layers=-1), tiny_model)
    assert mine.dropout == 0.3, "how it is trained on is not the adapter's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 16}, "train.rank = 16: .* has 3; leave the setting out"),
        ({"num_layers": 3}, "train.num_layers = 3: .* has 2"),
        ({"num_layers": -1}, "train.num_layers = -1: .* has 2"),
        ({"method": "dora"}, "train.method = 'dora': .* has lora"),
        ({"alpha": 5.0}, r"a scale of 1\.66667 .* has 10\.66"),
        ({"scale": 20.0}, "a scale of 20 "),
        ({"rank_stabilized": True}, r"a scale of 18\.47"),
        ({"targets": ["mlp"]}, "train.targets = mlp: .* has self_attn.q_proj, self_attn.v_proj"),
    ],
)
def test_a_setting_that_says_something_else_is_refused(
    tmp_path: Path, tiny_model: ModelFolder, change: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path / "a", tiny_model, rank=3, num_layers=2, targets=["q_proj", "v_proj"])
    same = {"rank": 3, "num_layers": 2, "alpha": 32.0, "targets": ["v_proj", "self_attn.q_proj"]}
    begin_from(settings_of(from_adapter=str(folder), **same), tiny_model)
    with pytest.raises(InputError, match=message):
        begin_from(settings_of(from_adapter=str(folder), **change), tiny_model)


def test_full_training_and_soft_prompts_have_to_be_said(tmp_path: Path, tiny_model: ModelFolder) -> None:
    folder = saved(tmp_path / "a", tiny_model, method="soft-prompt", prompt_tokens=4)
    with pytest.raises(InputError, match=r"is of method soft-prompt, .*set train\.method=soft-prompt"):
        check_starting_point(settings_of(from_adapter=str(folder)))
    check_starting_point(settings_of(from_adapter=str(folder), method="soft-prompt"))


def test_a_folder_that_is_no_adapter_is_refused_before_anything_begins(
    tmp_path: Path, tiny_model: ModelFolder, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{source: {tiny_model.path}}}\ntrain: {{from_adapter: none}}\n")
    assert command(["finetune", str(config)]) == 2
    assert "train.from_adapter = 'none': no such folder" in " ".join(capsys.readouterr().err.split())
    assert not (home / "mlflow.db").exists()
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        check_starting_point(settings_of(from_adapter=str(tmp_path)))


def test_damaged_weights_are_not_taken(tmp_path: Path, tiny_model: ModelFolder) -> None:
    folder = saved(tmp_path / "a", tiny_model, num_layers=2)
    network = load_model(tiny_model.path).model
    add_adapter(network, adapter_config(settings_of(num_layers=2), 4), 0)
    weights = adapter_weights(network)
    save_adapter(folder, weights | {min(weights): mx.zeros((3, 3))}, {"num_layers": 2})
    with pytest.raises(InputError, match=r"is \(3, 3\), expected"):
        take_weights(network, folder)


def test_the_folder_is_found_beside_the_yaml_and_kept_whole_for_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "config.yaml").write_text("train: {from_adapter: mine}\n")
    assert load_settings(tmp_path / "config.yaml").train.from_adapter == str(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    kept = settings_as_yaml(load_settings(None, ["train.from_adapter=mine"]))
    assert f"from_adapter: {tmp_path / 'mine'}\n" in kept


def test_a_search_has_nothing_to_choose_then() -> None:
    settings = Settings.model_validate(
        {"train": {"from_adapter": "some/folder"}, "search": {"num_layers": [2]}}
    )
    with pytest.raises(InputError, match="a search chooses rank and layers"):
        check_space(settings, 4)
