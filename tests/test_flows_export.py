"""`tunesmith export`: from a run to a folder that other tools take, with a card of what the run has left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from peft_folders import write_peft_folder

from flows.card_facts import prepared_folder
from flows.cli import run as command
from flows.resume import SETTINGS_FILE, settings_as_yaml
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.home import runs_dir
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.origin import read_front_matter
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.tracking import mlflow_run, read_record
from tasks.train.adapters import load_adapter
from tasks.train.peft_import import as_mlx_adapter
from tasks.train.step import TRAINING_TAG, train_adapter

METRICS = {"base/test_loss": 3.0, "test/test_loss": 2.0, "base/chrf": 1.0, "test/chrf": 2.0}
METRICS |= {"change/test_loss": -1.0, "change/test_loss_low": -1.5, "change/test_loss_high": -0.5}
SECRET = "hunter2"


@dataclass(frozen=True)
class Made:
    """A home with one finished run, as far as an export looks at it."""

    home: Path
    settings: Settings
    run_id: str


def finish_run(settings: Settings, name: str, kept: Settings | None = None) -> str:
    """Run what an export looks at; `kept` are the settings that the run says it had."""
    with mlflow_run(settings, name, {}) as run:
        run.log_text(settings_as_yaml(kept or settings), SETTINGS_FILE)
        model = resolve_model(settings.model)
        train_adapter(settings.train, model, prepare_data(settings.data, model, run), run)
        run.report(0, METRICS)
    return run.id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFolder) -> Iterator[Made]:
    """The home that all tests here share: making MLflow's tables takes seconds."""
    folder = tmp_path_factory.mktemp("made")
    rows = folder / "private" / "rows.jsonl"
    rows.parent.mkdir()
    lines = [json.dumps({"prompt": f"{n}+1", "completion": str(n + 1)}) for n in range(40)]
    rows.write_text("\n".join(lines) + "\n")
    settings = load_settings(
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder))
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        yield Made(folder, settings, finish_run(settings, "sums"))


@pytest.fixture(autouse=True)
def home(made: Made, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TUNESMITH_HOME", str(made.home))
    monkeypatch.setenv("TUNESMITH_CACHE", str(made.home / "cache"))
    return made.home


def adapter_of(run_id: str) -> Path:
    """Where the training step put the adapter of a run."""
    return runs_dir() / "steps" / "train" / read_record(TrackingSettings(), run_id).tags[TRAINING_TAG]


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
    made: Made, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "sums-peft"
    assert str(out) in export(capsys, "sums", "--to", "peft", "--out", out)
    ours = adapter_of(made.run_id)
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
    made: Made, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sums"
    export(capsys, made.run_id[:8], "--to", "hf", "--out", out)
    adapter = adapter_of(made.run_id)
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
    for place in (tmp_path, made.home, tiny_model.path, Path.home()):
        assert str(place) + "/" not in shown
    fused = list((runs_dir() / "steps" / "fuse").glob("*/"))
    export(capsys, "sums", "--to", "hf", "--out", tmp_path / "again")
    assert list((runs_dir() / "steps" / "fuse").glob("*/")) == fused, "made once"


def test_passwords_of_settings_are_in_no_card(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = {"system_prompt": f"Ask ftp://me:{SECRET}@host."}
    told = made.settings.model_copy(update={"data": made.settings.data.model_copy(update=prompt)})
    run_id = finish_run(told, f"at postgresql://me:{SECRET}@host/db")
    export(capsys, run_id, "--to", "peft", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("***@host") == 2
    assert SECRET not in card


def test_a_hub_dataset_is_named_in_the_head(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_hub = made.settings.data.model_copy(update={"source": "owner/rows"})
    run_id = finish_run(made.settings, "hub", kept=made.settings.model_copy(update={"data": of_hub}))
    export(capsys, run_id, "--to", "peft", "--out", tmp_path / "out")
    assert front_matter(tmp_path / "out")["datasets"] == ["owner/rows"]


def test_an_upload_follows_the_export_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    made: Made, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for to in ("peft", "hf"):
        told = export(capsys, tiny_model.path, "--to", to, "--out", out, code=2)
        assert f"is a model by itself, and --to {to} is of an adapter" in told
    prepared = made.home / "steps" / "prepare"
    prepared.rename(aside := made.home / "aside")
    told = export(capsys, "sums", "--to", "hf", "--out", out, code=2)
    aside.rename(prepared)
    assert "its prepared data is not in" in told
    inside = runs_dir() / "steps" / "mine"
    assert "step outputs" in export(capsys, "sums", "--to", "peft", "--out", inside, code=2)
    assert not out.exists()


def test_a_file_that_came_with_an_adapter_leads_nowhere_else(made: Made, tmp_path: Path) -> None:
    adapter = adapter_of(made.run_id)
    prepared = prepared_folder(adapter)
    assert prepared is not None
    assert prepared.parent == made.home / "steps" / "prepare"
    record = {"inputs": {"data": f"../prepare/{prepared.name}"}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert prepared_folder(tmp_path) is None


def test_an_adapter_of_pefts_is_a_target_too(
    tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write_peft_folder(tmp_path / "theirs", base_model_name_or_path=str(tiny_model.path))
    export(capsys, theirs, "--to", "peft", "--out", tmp_path / "ours")
    assert yaml.safe_load((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 4
    nameless = write_peft_folder(tmp_path / "nameless", base_model_name_or_path=None)
    told = export(capsys, nameless, "--to", "peft", "--out", tmp_path / "none", code=2)
    assert "names no base model" in told
