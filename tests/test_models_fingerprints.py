"""A model's fingerprint follows the contents of its files, and large files are read once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tasks.models import fingerprints
from tasks.models.fingerprints import file_digest, folder_fingerprint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "REMEMBER_FROM_BYTES", 1000)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w" * 5000)
    return folder


def test_equal_contents_have_equal_fingerprints_in_different_folders(tmp_path: Path) -> None:
    first = model_folder(tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    (second / "README.md").write_text("about")
    assert folder_fingerprint(first) == folder_fingerprint(second)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"]
)
def test_every_file_that_decides_the_model_changes_the_fingerprint(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    before = folder_fingerprint(folder)
    (folder / name).write_bytes(b"w" * 4999 + b"x")
    assert folder_fingerprint(folder) != before


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model_folder(tmp_path / "model") / "model.safetensors"
    first = file_digest(weights)
    with monkeypatch.context() as held:
        held.setattr(fingerprints, "_sha256", lambda *_: pytest.fail("read again"))
        assert file_digest(weights) == first


def test_a_file_of_the_same_size_and_time_under_another_inode_is_read(tmp_path: Path) -> None:
    weights = model_folder(tmp_path / "model") / "model.safetensors"
    first, status = file_digest(weights), weights.stat()
    other = tmp_path / "other"
    other.write_bytes(b"x" * 5000)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(weights)
    assert file_digest(weights) != first


def test_a_damaged_memory_of_digests_is_only_a_slower_start(tmp_path: Path) -> None:
    weights = model_folder(tmp_path / "model") / "model.safetensors"
    first = file_digest(weights)
    for text in ("", "{", "[]", f'{{"{weights}": 3}}'):
        (tmp_path / "cache" / "digests.json").write_text(text)
        assert file_digest(weights) == first
