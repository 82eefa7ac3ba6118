"""A base model quantised by MLX: once, into a model folder of its own, the base of every later step."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

from tasks.config import QuantizeSettings
from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.fingerprints import folder_fingerprint
from tasks.models.gguf_import import as_folder_name
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.models.safety import check_folder, read_config
from tasks.models.write import write_model
from tasks.progress import progress
from tasks.publish import code_version, fingerprint, publishing

log = logging.getLogger(__name__)


def quantised_name(name: str, settings: QuantizeSettings) -> str:
    """The base's name with the bits: "SmolLM2-135M-Instruct-4bit"."""
    return f"{name}-{settings.bits}bit"


def quantised_folder(folder: Path, name: str, settings: QuantizeSettings) -> Path:
    """The model folder of `folder` quantised, made on the first call and reused after it.

    It has mlx-lm's own layout, as `mlx_lm.convert -q` makes it, and lies beside the imported models.
    Matrices whose width is no multiple of the group size stay as they are.

    Raises:
        InputError: the base is quantised already, or no matrix of it can be.
    """
    config = read_config(folder)
    if "quantization" in config or "quantization_config" in config:
        raise InputError(f"model.quantize: {folder} is quantised already; leave model.quantize out")
    check_folder(folder)
    inputs = {
        "base": folder_fingerprint(folder),
        **settings.model_dump(mode="json"),
        "code": code_version("models"),
    }
    name = as_folder_name(quantised_name(name, settings))
    target = cache_dir() / "models" / f"{name}-{fingerprint(inputs)}"
    if target.is_dir():
        log.info("%s: quantised before, reusing %s", name, target)
        return target
    with publishing(target) as draft, progress(f"quantising to {settings.bits} bits"):
        _write_quantised(folder, draft, settings)
    log.info("%s: quantised from %s into %s", name, folder, target)
    return target


def _write_quantised(folder: Path, draft: Path, settings: QuantizeSettings) -> None:
    import_mlx_lm()
    from mlx_lm.utils import compute_bits_per_weight, load_model, quantize_model

    try:
        model, config = load_model(folder, lazy=True, strict=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: mlx_lm cannot load this model: {error}") from None
    with redirect_stdout(io.StringIO()):  # mlx_lm prints the bits per weight
        model, config = quantize_model(model, config, settings.group_size, settings.bits)
    if not any(hasattr(module, "bits") for module in model.modules()):
        raise InputError(
            f"model.quantize.group_size = {settings.group_size}: no matrix of {folder} has a width that is a "
            "multiple of it; give a smaller one"
        )
    log.info("%.2f bits a weight", compute_bits_per_weight(model))
    write_model(draft, model, config, folder)
