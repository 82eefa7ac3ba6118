"""`tunesmith export --to gguf`: from a run, an adapter or a model to a folder for llama.cpp and Ollama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_fuse_gguf_export import adapter_of, tiny_folder

from flows.cli import run
from flows.exporting_gguf import prepared_data
from tasks.config import ModelSettings
from tasks.home import runs_dir
from tasks.models.gguf_check import read_gguf
from tasks.models.resolve import resolve_model
from tasks.publish import StepOutput, write_json
from tasks.train.use import write_use


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says what its base is, trained with a template and a system prompt of its own."""
    folder = tmp_path_factory.mktemp("export")
    model = resolve_model(ModelSettings(source=str(tiny_folder(folder / "model").path)))
    data = folder / "data"
    data.mkdir()
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    (data / "chat_template.jinja").write_text(source + "{% if add_generation_prompt %}assistant: {% endif %}")
    write_json(data / "inputs.json", {"data": {"system_prompt": "Be brief."}})
    path = adapter_of(folder / "adapter", model)
    write_use(path, model, StepOutput(data, "data", False, 0.0))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(["export", *arguments]) == code
    captured = capsys.readouterr()
    return " ".join((captured.err if code else captured.out).split())


def test_base_and_adapter_become_one_file_with_the_template_of_the_training(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    said = told(capsys, str(adapter), "--to", "gguf", "--out", str(out), "--type", "f32")
    assert str(out / "tuned-F32.gguf") in said
    assert "0.0% of its greedy tokens differ" in said
    metadata = read_gguf(out / "tuned-F32.gguf").metadata
    assert "{{ m.role }}: {{ m.content }}" in metadata["tokenizer.chat_template"]
    text = (out / "Modelfile").read_text()
    assert "FROM ./tuned-F32.gguf" in text
    assert '{{ if eq .Role "system" }}system: {{ .Content }}<|end|>' in text
    assert 'SYSTEM """Be brief."""' in text
    assert 'PARAMETER stop "<|end|>"' in text


def test_the_adapter_alone_becomes_a_lora_of_its_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    assert "every number is the adapter's own" in told(
        capsys, str(adapter), "--to", "gguf-lora", "--out", str(out)
    )
    text = (out / "Modelfile").read_text()
    assert "FROM ./model.gguf\nADAPTER ./tuned-lora-F32.gguf" in text
    assert '"system" }}system: {{ .Content }}<|end|>' in text


def test_a_model_by_itself_is_exported_as_it_is_and_has_no_lora(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(adapter.parent / "model"), str(tmp_path / "plain")
    assert "plain-F16.gguf" in told(capsys, model, "--to", "gguf", "--out", out)
    assert "use --to gguf" in told(capsys, model, "--to", "gguf-lora", "--out", out + "2", code=2)


def test_places_and_formats_that_cannot_be_are_refused_before_anything_is_done(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    full = str(tmp_path / "full")
    assert "is there already; give a new folder" in told(
        capsys, str(adapter), "--to", "gguf", "--out", full, code=2
    )
    steps = str(runs_dir() / "steps" / "here")
    assert "own step outputs" in told(capsys, str(adapter), "--to", "gguf", "--out", steps, code=2)
    new = str(tmp_path / "new")
    assert "stays f32; leave --type out" in told(
        capsys, str(adapter), "--to", "gguf-lora", "--type", "f16", "--out", new, code=2
    )
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_the_rows_of_the_training_are_found_where_they_are_still_there(tmp_path: Path) -> None:
    assert prepared_data(tmp_path) is None
    (tmp_path / "training.json").write_text(json.dumps({"inputs": {"data": "abc"}}))
    assert prepared_data(tmp_path) is None
    (runs_dir() / "steps" / "prepare" / "abc").mkdir(parents=True)
    found = prepared_data(tmp_path)
    assert found is not None
    assert (found.path, found.fingerprint) == (runs_dir() / "steps" / "prepare" / "abc", "abc")
