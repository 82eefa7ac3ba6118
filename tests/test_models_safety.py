"""Malformed weights and models that want to run code are refused before anything reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.errors import InputError
from tasks.models.safety import check_folder, check_safetensors


def write_safetensors(path: Path, header: dict[str, Any] | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_written_by_safetensors_passes(tmp_path: Path) -> None:
    arrays = {
        "a": np.zeros((2, 3), np.float32),
        "b": np.zeros(5, np.float16),
        "c": np.zeros((0, 4), np.uint32),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    check_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "data_bytes", "reason"),
    [
        ({"a": entry(0, 8, 2)}, 12, "end at byte 8 of 12"),
        ({"a": entry(0, 8, 2)}, 4, "end at byte 8 of 4"),
        ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, 12, "tensor b lies at bytes 4 to 12"),
        ({"a": entry(0, 8, 2), "b": entry(12, 20, 2)}, 20, "tensor b lies at bytes 12 to 20"),
        ({"a": entry(0, 8, 3)}, 8, "expected 12 bytes"),
        ({"a": entry(0, 8, -2)}, 8, "negative size"),
        ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, 8, "malformed tensor entry"),
        ({"a": {"dtype": "F32"}}, 8, "malformed tensor entry"),
        ("[1, 2]", 0, "not an object"),
        ("{", 0, "unreadable safetensors header"),
        (
            f'{{"a": {json.dumps(entry(0, 8, 2))}, "a": {json.dumps(entry(0, 8, 2))}}}',
            8,
            "a name occurs twice",
        ),
    ],
)
def test_malformed_safetensors_are_refused_with_file_and_fault(
    tmp_path: Path, header: dict[str, Any] | str, data_bytes: int, reason: str
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{reason}"):
        check_safetensors(path)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for data in (b"", b"\x01\x02", struct.pack("<Q", 1 << 60) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(InputError, match="header of"):
            check_safetensors(path)


def model_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_model_that_asks_to_run_its_own_code_is_refused(tmp_path: Path) -> None:
    check_folder(model_folder(tmp_path / "plain"))
    with pytest.raises(InputError, match=r"model_file = 'evil\.py'"):
        check_folder(model_folder(tmp_path / "file", model_file="evil.py"))
    folder = model_folder(tmp_path / "map")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    with pytest.raises(InputError, match="auto_map"):
        check_folder(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        check_folder(tmp_path)
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError, match=r"no model\*\.safetensors"):
        check_folder(folder)
    for text in ("{", "[]", '{"hidden_size": 3}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            check_folder(folder)
