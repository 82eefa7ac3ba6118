"""What stands for a model to use: runs, adapters, models; each with its own base, or a reason why not."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from flows.targets import adapter_target, find_target, newest_target
from tasks.config import ModelSettings, Settings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model
from tasks.publish import INPUTS_FILE, StepOutput, write_json
from tasks.tracking import mlflow_run
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.use import USE_FILE, read_use, write_use


@pytest.fixture
def base(tiny_model: ModelFolder, tmp_path: Path) -> ModelFolder:
    """A copy of the tiny model that a test may change."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model.path, folder)
    return resolve_model(ModelSettings(source=str(folder)))


@pytest.fixture
def data(tmp_path: Path) -> StepOutput:
    """As much of prepared data as an adapter keeps."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_json(folder / INPUTS_FILE, {"data": {"system_prompt": "Be brief."}})
    return StepOutput(folder, "data", False, 0.0)


@pytest.fixture
def adapter(base: ModelFolder, data: StepOutput, tmp_path: Path) -> Path:
    """An adapter as the training step writes it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    network = load_model(base.path).model
    config = adapter_config(Settings().train.model_copy(update={"num_layers": 2}), 4)
    add_adapter(network, config, 0)
    save_adapter(folder, adapter_weights(network), config)
    write_use(folder, base, data)
    return folder


def test_an_adapter_folder_brings_its_base_its_template_and_its_system_prompt(
    adapter: Path, base: ModelFolder
) -> None:
    target = find_target(str(adapter))
    assert target.adapter == adapter
    assert (target.model.path, target.model.fingerprint) == (base.path, base.fingerprint)
    assert (target.template, target.system_prompt) == ("{{ messages }}", "Be brief.")


def test_a_base_that_has_changed_since_is_refused(adapter: Path, base: ModelFolder) -> None:
    config = base.config()
    (base.path / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(InputError, match=f"the adapter was trained on {base.fingerprint}"):
        find_target(str(adapter))


def test_a_base_that_is_gone_is_named(adapter: Path, base: ModelFolder) -> None:
    shutil.rmtree(base.path)
    with pytest.raises(InputError, match=f"{base.path}.*no such file or folder"):
        find_target(str(adapter))


def test_a_base_without_settings_is_found_in_the_cache_by_its_fingerprint(
    adapter: Path, base: ModelFolder, home: Path
) -> None:
    known = json.loads((adapter / USE_FILE).read_text())
    known["base"]["settings"] = None
    write_json(adapter / USE_FILE, known)
    with pytest.raises(InputError, match="nothing says where it came from"):
        find_target(str(adapter))
    shutil.copytree(base.path, home / "cache" / "models" / "imported")
    assert find_target(str(adapter)).model.path == home / "cache" / "models" / "imported"


def test_an_adapter_of_mlx_lm_names_its_base_in_its_config(adapter: Path, base: ModelFolder) -> None:
    (adapter / USE_FILE).unlink()
    with pytest.raises(InputError, match="says nothing of its base model"):
        find_target(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "model": str(base.path)})
    assert find_target(str(adapter)).model.path == base.path


def test_a_damaged_use_file_is_named(adapter: Path) -> None:
    (adapter / USE_FILE).write_text('{"base": {}}')
    with pytest.raises(InputError, match=r"use\.json"):
        read_use(adapter)


def test_a_model_stands_for_itself(base: ModelFolder) -> None:
    target = find_target(str(base.path))
    assert (target.model.path, target.adapter, target.run_id) == (base.path, None, None)


def test_a_run_is_meant_by_its_name_its_id_or_the_beginning_of_it(adapter: Path) -> None:
    with mlflow_run(Settings(), "sums", {}) as run:
        run.log_files(adapter, "adapter")
    with mlflow_run(Settings(), "nothing", {}) as empty:
        pass
    for text in ("sums", run.id, run.id[:8]):
        target = find_target(text)
        assert (target.run_id, target.system_prompt) == (run.id, "Be brief.")
    assert newest_target().run_id == run.id, "the newest that has an adapter"
    with pytest.raises(InputError, match="has no adapter"):
        find_target(empty.id)


def test_of_runs_of_one_name_the_newest_finished_one_is_meant(adapter: Path) -> None:
    ids = []
    for fails in (False, False, True):
        with pytest.raises(KeyError) if fails else nullcontext(), mlflow_run(Settings(), "sums", {}) as run:
            run.log_files(adapter, "adapter")
            ids.append(run.id)
            if fails:
                raise KeyError
    assert find_target("sums").run_id == ids[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none", "no run of that id or name"),
        ("none@champion", "no registered model 'none'; there are none yet"),
        ("none/3", "no registered model 'none'"),
        ("./none", "no such file or folder"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_target(text)


def test_an_adapter_without_weights_is_no_target(adapter: Path) -> None:
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no adapters\.safetensors"):
        adapter_target("it", adapter)
