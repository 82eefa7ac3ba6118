"""A base is found again by its fingerprint, on another kind of device too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.config import ModelSettings, QuantizeSettings
from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.find import find_base
from tasks.models.folder import ModelFolder
from tasks.models.resolve import resolve_model
from tests.test_models_gguf import Q8_0, write_tiny_gguf


@pytest.mark.parametrize("trained_on_gpu", [True, False])
def test_a_gguf_base_of_a_gpu_is_found_on_cpu_and_the_other_way_round(
    trained_on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(source=str(tmp_path / "tiny.gguf"))
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=Q8_0)
    monkeypatch.setattr("tasks.models.gguf_import.on_gpu", lambda: trained_on_gpu)
    trained = resolve_model(settings)
    shutil.rmtree(cache_dir() / "models")
    monkeypatch.setattr("tasks.models.gguf_import.on_gpu", lambda: not trained_on_gpu)
    assert resolve_model(settings).fingerprint != trained.fingerprint
    found = find_base("tiny", trained.fingerprint, settings)
    assert (found.fingerprint, found.path) == (trained.fingerprint, trained.path)


def test_a_quantised_base_is_made_again(tiny_model: ModelFolder) -> None:
    settings = ModelSettings(source=str(tiny_model.path), quantize=QuantizeSettings(bits=4, group_size=32))
    trained = resolve_model(settings)
    shutil.rmtree(trained.path)
    assert find_base("tiny", trained.fingerprint, settings).path == trained.path


def test_another_model_under_the_same_source_is_refused_with_both_fingerprints(
    tiny_model: ModelFolder,
) -> None:
    settings = ModelSettings(source=str(tiny_model.path))
    there = resolve_model(settings).fingerprint
    with pytest.raises(InputError, match=f"is {there} now, the adapter was trained on 0123"):
        find_base("tiny", "0123", settings)
