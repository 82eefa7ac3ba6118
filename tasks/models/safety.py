"""Checks of model files before anything reads them: malformed weights and code that wants to run."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from tasks.errors import InputError

# Width of an element in bits, by safetensors type name.
TYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
}
FETCH_AGAIN = "fetch the file again"


def check_folder(folder: Path) -> None:
    """Hold a model folder to what `load_model` relies on, reading headers only.

    Raises:
        InputError: a file is missing or malformed, or the model needs its own Python code.
    """
    config = read_config(folder)
    refuse_custom_code(folder, config)
    weights = sorted(folder.glob("*.safetensors"))
    if not any(path.name.startswith("model") for path in weights):
        raise InputError(f"{folder}: has no model*.safetensors; give a folder in MLX or Hugging Face layout")
    for path in weights:
        check_safetensors(path)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder; `InputError` when it is missing or not an object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: has no config.json; give a folder in MLX or Hugging Face layout"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {FETCH_AGAIN}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: names no model_type; give a language model's folder")
    return config


def refuse_custom_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that is built by Python of its own; Tunesmith never runs a model's code."""
    if config.get("model_file") is not None:
        raise InputError(
            f"{folder}/config.json: model_file = {config['model_file']!r} asks to run code from the model; "
            "use a model whose model_type mlx_lm knows"
        )
    tokenizer = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    for path, values in ((folder / "config.json", config), (tokenizer, settings)):
        automatic = values.get("auto_map") if isinstance(values, dict) else None
        needed = _needs_code(automatic, folder)
        if needed:
            raise InputError(
                f"{path}: auto_map = {needed!r} asks to run code from the model; "
                "use a version of it without custom code (with tokenizer.json)"
            )


def check_safetensors(path: Path) -> None:
    """Hold a safetensors file to its format: tensors tile the file exactly, without gap or overlap.

    `mx.load` (0.32.4) accepts trailing bytes, overlaps and duplicate names.

    Raises:
        InputError: names the file and the fault.
    """
    from safetensors import SafetensorError, safe_open

    header, data_bytes = _read_header(path)
    _check_tiling(path, header, data_bytes)
    try:
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: malformed safetensors ({error}); {FETCH_AGAIN}") from None


def _needs_code(automatic: Any, folder: Path) -> str | None:
    # A model mlx_lm has code for keeps its auto_map for other programs; only a tokenizer without
    # tokenizer.json would really be read through it.
    if not isinstance(automatic, dict) or (folder / "tokenizer.json").is_file():
        return None
    wanted = automatic.get("AutoTokenizer")
    return str(wanted) if wanted else None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise InputError(f"{path}: header of {length:,} bytes in a file of {size:,}; {FETCH_AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise InputError(f"{path}: unreadable safetensors header ({error}); {FETCH_AGAIN}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is not an object; {FETCH_AGAIN}")
    header.pop("__metadata__", None)
    return header, size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("a name occurs twice")
    return known


def _check_tiling(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    try:
        extents = sorted(_extent(name, entry) for name, entry in header.items())
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: malformed tensor entry ({error!r}); {FETCH_AGAIN}") from None
    position = 0
    for begin, end, name, expected in extents:
        if begin != position or end - begin != expected:
            raise InputError(
                f"{path}: tensor {name} lies at bytes {begin:,} to {end:,}, expected {expected:,} bytes "
                f"from {position:,}; {FETCH_AGAIN}"
            )
        position = end
    if position != data_bytes:
        raise InputError(f"{path}: tensors end at byte {position:,} of {data_bytes:,}; {FETCH_AGAIN}")


def _extent(name: str, entry: dict[str, Any]) -> tuple[int, int, str, int]:
    begin, end = map(int, entry["data_offsets"])
    shape = [int(size) for size in entry["shape"]]
    if any(size < 0 for size in shape):
        raise ValueError(f"negative size in {shape}")
    return begin, end, name, math.prod(shape) * TYPE_BITS[entry["dtype"]] // 8
