"""From what the settings name to a model folder that MLX takes as it is."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from tasks.config import ModelSettings
from tasks.errors import InputError
from tasks.models.bundled import BUNDLED_NAME, BUNDLED_SOURCE, bundled_gguf
from tasks.models.fingerprints import folder_fingerprint
from tasks.models.folder import ModelFolder
from tasks.models.gguf_check import has_gguf_magic
from tasks.models.hub import download_config, download_model, downloaded_model, is_hub_name
from tasks.models.safety import check_folder, read_config

CHOICES = f"give '{BUNDLED_SOURCE}', a hub name (owner/name), a folder, or a .gguf file"


def resolve_model(settings: ModelSettings) -> ModelFolder:
    """The base model as a folder: imported, found or downloaded, its files checked, fingerprinted.

    With `settings.quantize` it is the folder of the quantised model, which is the base of every step.

    Raises:
        InputError: the source does not exist, is malformed, or cannot be represented.
    """
    source = settings.source
    found = check_model(settings)
    if found is not None and found.is_file():
        # Imported late: tokenizers and mlx_lm cost seconds that a hub name or folder need not pay.
        from tasks.models.gguf_import import import_gguf

        name = _gguf_name(settings, found)
        folder = import_gguf(found, name, _gguf_precision(settings))
    elif found is not None:
        name, folder = found.name, found
    else:
        name, folder = source.rpartition("/")[2], download_model(source, settings.revision)
    if settings.quantize:
        from tasks.models.quantise import quantised_folder, quantised_name

        folder = quantised_folder(folder, name, settings.quantize)
        name = quantised_name(name, settings.quantize)
    elif settings.dequantize and {"quantization", "quantization_config"} & read_config(folder).keys():
        raise InputError(
            f"model.dequantize: {folder} is no GGUF file; take the model's repository that is not quantised"
        )
    check_folder(folder)
    return ModelFolder(folder, name, folder_fingerprint(folder), source, settings)


def model_config(settings: ModelSettings) -> dict[str, Any]:
    """The `config.json` of the base that the settings name, without its weights where it is not here yet.

    Raises:
        InputError: there is no such model, or the hub cannot be reached.
    """
    found = check_model(settings)
    if found is None:
        config = download_config(settings.source, settings.revision)
    elif found.is_file():
        from tasks.models.gguf_import import gguf_folder_config

        config = gguf_folder_config(found, _gguf_name(settings, found), _gguf_precision(settings))
    else:
        config = read_config(found)
    if settings.quantize:
        config["quantization"] = {
            "bits": settings.quantize.bits,
            "group_size": settings.quantize.group_size,
        }
    return config


def tokenizer_folder(settings: ModelSettings) -> Path | None:
    """A folder with the base's tokenizer, where one is here: nothing is imported, quantised or downloaded.

    Raises:
        InputError: as `check_model`.
    """
    found = check_model(settings)
    if found is None:
        return downloaded_model(settings.source, settings.revision)
    if found.is_file():
        from tasks.models.gguf_import import imported_folder

        return imported_folder(found, _gguf_name(settings, found), _gguf_precision(settings))
    return found


def _gguf_name(settings: ModelSettings, found: Path) -> str:
    return BUNDLED_NAME if settings.source == BUNDLED_SOURCE else found.stem


def _gguf_precision(settings: ModelSettings) -> Literal["float32"] | None:
    """What is stored may be quantised already, in another way than the one asked for."""
    return "float32" if settings.quantize or settings.dequantize else None


def check_model(settings: ModelSettings) -> Path | None:
    """Raise what can be known about the source without importing, downloading or reading weights.

    Returns:
        The .gguf file or folder it names here; None for a hub name.

    Raises:
        InputError: a path that does not exist, a file that is not GGUF, a folder that is no model.
    """
    source = settings.source
    if source == BUNDLED_SOURCE:
        return _checked_gguf(bundled_gguf())
    path = Path(source).expanduser()
    if path.is_file():
        return _checked_gguf(path.resolve())
    if path.is_dir():
        return _checked_folder(path.resolve())
    if _looks_like_path(source):
        raise InputError(f"model.source = '{source}': no such file or folder ({path.absolute()}); {CHOICES}")
    if not is_hub_name(source):
        close = difflib.get_close_matches(source.lower(), [BUNDLED_SOURCE], cutoff=0.5)
        hint = f"did you mean '{close[0]}'? Else " if close else ""
        raise InputError(f"model.source = '{source}': names no model; {hint}{CHOICES}")
    return None


def _checked_gguf(path: Path) -> Path:
    if not has_gguf_magic(path):
        raise InputError(f"{path}: is not a GGUF file (it does not start with 'GGUF'); {CHOICES}")
    return path


def _checked_folder(path: Path) -> Path:
    read_config(path)
    if not any(path.glob("model*.safetensors")):
        raise InputError(f"{path}: has no model*.safetensors; {CHOICES}")
    return path


def _looks_like_path(source: str) -> bool:
    starts = source.startswith((".", "/", "~", "\\"))
    return (
        starts or source.endswith(("/", ".gguf", ".safetensors")) or source.count("/") > 1 or "\\" in source
    )
