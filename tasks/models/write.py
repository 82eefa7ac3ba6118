"""A model in memory written as an MLX model folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn

KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
WRITTEN_ANEW = {"config.json", "model.safetensors.index.json"}
OF_THE_BASE_ONLY = {"hf_quant_config.json", "inputs.json", "fusion.json", "adapter_config.json"}
"""They say how the base's weights are stored or came about, which is no longer true of these."""


def write_model(folder: Path, network: nn.Module, config: dict[str, Any], base: Path) -> None:
    """Weights and `config.json` of `network`, and the tokenizer's files of `base`; never its code.

    `mlx_lm.utils.save` (0.32.2) would copy any `*.py` of the base, through symbolic links too.

    Raises:
        InputError: a file of `base` is a link to somewhere else.
    """
    from mlx_lm.utils import save_config, save_model

    kept = [path for path in sorted(base.iterdir()) if _is_kept(path)]
    for path in kept:
        _refuse_foreign_link(path)
    save_model(folder, network)
    save_config(dict(config), folder / "config.json")
    for path in kept:
        shutil.copyfile(path, folder / path.name)


def _is_kept(path: Path) -> bool:
    """Whether a file of the base goes into the folder of its successor."""
    return path.suffix in KEPT_SUFFIXES and path.name not in WRITTEN_ANEW | OF_THE_BASE_ONLY


def _refuse_foreign_link(path: Path) -> None:
    """Let no link lead out of the base: what it points at may be private, and would be published.

    The hub's cache is made of links, from `snapshots/<revision>` to `blobs` beside it; those are its own.
    """
    if not path.is_symlink():
        return
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    blobs = folder.parent.parent / "blobs"
    if target.parent != folder and not (folder.parent.name == "snapshots" and target.parent == blobs):
        raise InputError(
            f"{path}: is a link to {os.readlink(path)}, outside of the model's folder, and would be copied "
            "from there; put the file itself in its place, or remove it"
        )
