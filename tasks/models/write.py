"""A model in memory written as an MLX model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.nn as nn

KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
WRITTEN_ANEW = ("config.json", "model.safetensors.index.json")


def write_model(folder: Path, network: nn.Module, config: dict[str, Any], base: Path) -> None:
    """Weights and `config.json` of `network`, and the tokenizer's files of `base`; never its code.

    `mlx_lm.utils.save` (0.32.2) would copy any `*.py` of the base, through symbolic links too.
    """
    from mlx_lm.utils import save_config, save_model

    save_model(folder, network)
    save_config(dict(config), folder / "config.json")
    for path in base.iterdir():
        if path.suffix in KEPT_SUFFIXES and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)
