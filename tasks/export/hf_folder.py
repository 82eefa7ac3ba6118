"""A fused model as a folder in Hugging Face's layout: mlx-lm and transformers both load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.models.fingerprints import CONTENT, EXTRA
from tasks.models.hub import is_hub_name
from tasks.models.safety import read_config
from tasks.publish import write_json

INDEX = "*.safetensors.index.json"
"""Which tensor is in which of several files."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

NAMES_OF_PLACES = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}
"""Keys where transformers keeps where something was loaded from."""


def write_hf_folder(folder: Path, fused: Path) -> None:
    """Copy what a model consists of, and nothing else: weights, configs, tokenizer, chat template.

    `generation_config.json` is made from the config's special tokens where there is none, and a path that
    a config was loaded from is taken out.

    Args:
        folder: empty, to write into.
        fused: a model folder of the fuse step.
    """
    for name in sorted({path.name for pattern in (*CONTENT, *EXTRA, INDEX) for path in fused.glob(pattern)}):
        if (fused / name).is_file():
            shutil.copyfile(fused / name, folder / name)
    config = read_config(folder)
    if not (folder / "generation_config.json").exists():
        known = {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}
        write_json(folder / "generation_config.json", known)
    for name, key in NAMES_OF_PLACES.items():
        if (folder / name).is_file():
            _take_out_place(folder / name, key)


def is_quantised(folder: Path) -> bool:
    """Whether a model folder is in MLX's quantised form, which transformers cannot load."""
    return "quantization" in read_config(folder)


def _take_out_place(path: Path, key: str) -> None:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    place = values.get(key)
    if isinstance(place, str) and not is_hub_name(place):
        write_json(path, {name: value for name, value in values.items() if name != key})
