"""How much memory a run may take."""

from __future__ import annotations

import re

from tasks.errors import InputError

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text: str, free_bytes: int) -> int:
    """Bytes meant by `8GB`, `512MiB` or a share of `free_bytes` such as `75%`.

    Raises:
        InputError: anything else, zero, or a share over 100%.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)\s*", text, re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    number = float(match.group(1)) if match else 0.0
    if number <= 0 or (unit != "%" and unit not in UNITS) or (unit == "%" and number > 100):
        raise InputError(f"budget '{text}': give an amount such as 8GB or 512MiB, or a share such as 75%")
    return int(number / 100 * free_bytes) if unit == "%" else int(number * UNITS[unit])


def free_memory() -> int:
    """Bytes a run may take: Metal's recommended working set on a Mac, a GPU's own free memory, else what the
    machine has available."""
    import mlx.core as mx
    import psutil

    from tasks.models.device import on_gpu

    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if on_gpu() and "free_memory" in (told := mx.device_info()):
        return int(told["free_memory"])
    return int(psutil.virtual_memory().available)
