"""The record of a base model that passes between steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import ModelSettings


@dataclass(frozen=True)
class ModelFolder:
    """A base model as an MLX model folder, which `mlx_lm.load` takes as it is.

    Attributes:
        path: holds config.json, *.safetensors and the tokenizer's files.
        name: short and readable, for run names and reports ("SmolLM2-135M-Instruct").
        fingerprint: of the weights, the config and the tokenizer: equal for equal contents.
        source: what the settings named.
        settings: all that the settings said of it; None for one that was not resolved from settings.
    """

    path: Path
    name: str
    fingerprint: str
    source: str
    settings: ModelSettings | None = None

    def config(self) -> dict[str, Any]:
        """`config.json`, by which mlx-lm builds the model."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return config

    def language_config(self) -> dict[str, Any]:
        """`config.json`; of a model that also sees, the part that describes its language model."""
        config = self.config()
        return {**config, **config.get("text_config", {})}
