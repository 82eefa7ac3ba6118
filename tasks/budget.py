"""Amounts of memory as a person writes them."""

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
