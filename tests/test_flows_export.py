"""`tunesmith export`: from a run to a folder that other tools take, with a card of what the run has left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from peft_folders import write_peft_folder

from flows.cli import run as command
from flows.resume import SETTINGS_FILE, settings_as_yaml
from tasks.config import Settings, load_settings
from tasks.home import runs_dir
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.origin import read_front_matter
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.tracking import mlflow_run
from tasks.train.adapters import load_adapter
from tasks.train.peft_import import as_mlx_adapter
from tasks.train.step import train_adapter

METRICS = {"base/test_loss": 3.0, "test/test_loss": 2.0, "base/chrf": 1.0, "test/chrf": 2.0}
METRICS |= {"change/test_loss": -1.0, "change/test_loss_low": -1.5, "change/test_loss_high": -0.5}
SECRET = "hunter2"


@pytest.fixture
def settings(tmp_path: Path, tiny_model: ModelFolder) -> Settings:
    rows = tmp_path / "private" / "rows.jsonl"
    rows.parent.mkdir()
    lines = [json.dumps({"prompt": f"{n}+1", "completion": str(n + 1)}) for n in range(40)]
    rows.write_text("\n".join(lines) + "\n")
    return load_settings(
        None,
        [
            f"model.source={tiny_model.path}",
            f"data.source={rows}",
            "data.template=alpaca",
            "data.system_prompt=Add.",
            "train.num_layers=2",
            "train.max_steps=2",
            "train.learning_rate=1e-2",
            "name=sums",
        ],
    )


@pytest.fixture
def run_id(settings: Settings) -> str:
    """A finished run, as far as an export looks at it."""
    with mlflow_run(settings, "sums", {}) as run:
        run.log_text(settings_as_yaml(settings), SETTINGS_FILE)
        model = resolve_model(settings.model)
        train_adapter(settings.train, model, prepare_data(settings.data, model, run), run)
        run.report(0, METRICS)
    return run.id


def export(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert command(["export", *map(str, arguments)]) == code
    told = capsys.readouterr()
    return " ".join((told.out + told.err).split())


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    network = load_model(model).model
    if adapter:
        load_adapter(network, adapter)
    return np.array(network(mx.array([[5, 6, 7, 8]])))


def front_matter(folder: Path) -> dict[str, Any]:
    return read_front_matter((folder / "README.md").read_text())


def test_a_runs_adapter_goes_to_peft_and_comes_back(
    run_id: str, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "sums-peft"
    assert str(out) in export(capsys, "sums", "--to", "peft", "--out", out)
    [ours] = (runs_dir() / "steps" / "train").glob("*/")
    assert np.array_equal(
        logits(tiny_model.path, as_mlx_adapter(out, tiny_model)), logits(tiny_model.path, ours)
    )
    names = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert front_matter(out)["library_name"] == "peft"
    assert front_matter(out)["tags"] == ["mlx", "tunesmith", "lora"]
    again = export(capsys, "sums", "--to", "peft", "--out", out, code=2)
    assert "is there already; give a new folder" in again


def test_a_runs_model_goes_to_the_hubs_layout(
    run_id: str, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sums"
    export(capsys, run_id[:8], "--to", "hf", "--out", out)
    [adapter] = (runs_dir() / "steps" / "train").glob("*/")
    assert np.allclose(logits(out), logits(tiny_model.path, adapter), atol=1e-4)
    assert front_matter(out)["library_name"] == "transformers"
    assert "### Instruction" in (out / "chat_template.jinja").read_text()
    card = (out / "README.md").read_text()
    for told in (
        "# sums\n",
        "rows.jsonl",
        "| system prompt | Add. |",
        "| loss (nats a token) | 3 | 2 | -1 [",
    ):
        assert told in card
    assert "| num layers | 2 |" in card
    shown = "".join(path.read_text() for path in out.iterdir() if path.suffix in (".md", ".json"))
    for place in (tmp_path, runs_dir(), tiny_model.path, Path.home()):
        assert str(place) + "/" not in shown
    fused = list((runs_dir() / "steps" / "fuse").glob("*/"))
    export(capsys, "sums", "--to", "hf", "--out", tmp_path / "again")
    assert list((runs_dir() / "steps" / "fuse").glob("*/")) == fused, "made once"


def test_passwords_of_settings_are_in_no_card(
    run_id: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = settings.model_copy(
        update={
            "name": f"at postgresql://me:{SECRET}@host/db",
            "data": settings.data.model_copy(update={"system_prompt": f"Ask ftp://me:{SECRET}@host."}),
        }
    )
    with mlflow_run(told, str(told.name), {}) as run:
        model = resolve_model(told.model)
        train_adapter(told.train, model, prepare_data(told.data, model, run), run)
    export(capsys, run.id, "--to", "peft", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "***@host" in card
    assert SECRET not in card


def test_a_hub_dataset_is_named_in_the_head(
    run_id: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = settings.model_copy(update={"data": settings.data.model_copy(update={"source": "owner/rows"})})
    with mlflow_run(settings, "from the hub", {}) as run:
        run.log_text(settings_as_yaml(hub), SETTINGS_FILE)
        model = resolve_model(settings.model)
        train_adapter(settings.train, model, prepare_data(settings.data, model, run), run)
    export(capsys, run.id, "--to", "peft", "--out", tmp_path / "out")
    assert front_matter(tmp_path / "out")["datasets"] == ["owner/rows"]


def test_an_upload_follows_the_export_only_when_asked_for(
    run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploads = []

    def stand_in(folder: Path, name: str, public: bool) -> str:
        assert (folder / "README.md").is_file(), "it is whole by then"
        uploads.append((name, public))
        return "somewhere"

    monkeypatch.setattr("tasks.export.upload.upload", stand_in)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    export(capsys, "sums", "--to", "peft", "--out", tmp_path / "one")
    assert uploads == []
    refused = export(capsys, "sums", "--to", "peft", "--out", tmp_path / "two", "--upload", "me/sums", code=2)
    assert "HF_TOKEN is not set" in refused
    assert not (tmp_path / "two").exists()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    told = export(capsys, "sums", "--to", "peft", "--out", tmp_path / "two", "--upload", "me/sums")
    assert uploads == [("me/sums", False)]
    assert "uploaded somewhere" in told
    assert SECRET not in told
    assert 'PeftModel.from_pretrained(base, "me/sums")' in (tmp_path / "two" / "README.md").read_text()
    export(capsys, "sums", "--to", "peft", "--out", tmp_path / "3", "--upload", "me/sums", "--public")
    assert uploads[-1] == ("me/sums", True)


def test_what_cannot_be_exported_is_said(
    run_id: str, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for to in ("peft", "hf"):
        told = export(capsys, tiny_model.path, "--to", to, "--out", out, code=2)
        assert f"is a model by itself, and --to {to} is of an adapter" in told
    shutil.rmtree(runs_dir() / "steps" / "prepare")
    assert "its prepared data is not in" in export(capsys, "sums", "--to", "hf", "--out", out, code=2)
    inside = runs_dir() / "steps" / "mine"
    assert "step outputs" in export(capsys, "sums", "--to", "peft", "--out", inside, code=2)
    assert not out.exists()


def test_an_adapter_of_pefts_is_a_target_too(
    tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write_peft_folder(tmp_path / "theirs", base_model_name_or_path=str(tiny_model.path))
    export(capsys, theirs, "--to", "peft", "--out", tmp_path / "ours")
    assert yaml.safe_load((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 4
    nameless = write_peft_folder(tmp_path / "nameless", base_model_name_or_path=None)
    told = export(capsys, nameless, "--to", "peft", "--out", tmp_path / "none", code=2)
    assert "names no base model" in told
