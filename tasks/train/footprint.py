"""What the operating system counts as this process's memory, beside MLX's own count."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

RUSAGE_INFO_V2, FOOTPRINT_AT, INFO_BYTES = 2, 72, 512
"""proc_pid_rusage(3) of macOS: `ri_phys_footprint` stands after a 16-byte id and seven 8-byte counters."""


def process_footprint() -> int:
    """Bytes: the physical footprint on macOS, which counts what Metal holds, else the resident set."""
    if sys.platform == "darwin":
        with suppress(OSError, AttributeError):
            info = ctypes.create_string_buffer(INFO_BYTES)
            if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V2, info) == 0:
                return int.from_bytes(info.raw[FOOTPRINT_AT : FOOTPRINT_AT + 8], "little")
    import psutil

    return int(psutil.Process().memory_info().rss)
