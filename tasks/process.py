"""What has to be true of a process before MLX, Prefect or MLflow are imported in it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

DEFAULTS = {
    # Nothing leaves the machine: telemetry of the libraries is off.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Prefect gives its own server 20 s to start, too little on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # Alembic prints a line per migration; transformers looks for PyTorch and says so.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    # MLX on CUDA queues work whose arrays take this much (MB), ten times over, ahead of what is done. Its own
    # 1,000 on large GPUs doubles the peak memory of a step, for at most 3% of its time (H200).
    "MLX_MAX_MB_PER_BUFFER": "200",
    # Pickles are never read (MLflow's default is to read them).
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


@cache
def set_up_process() -> None:
    """Set the defaults above (a person's own environment wins) and load BLAS. Idempotent."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    load_blas()


@cache
def load_blas() -> str | None:
    """Load a fast BLAS ahead of MLX's reference one, and return the name of its file.

    The Linux CPU wheel of mlx (0.32.4) links reference BLAS, thirty times slower; symbols loaded
    first and globally win. OpenBLAS of the system is preferred, then the `mkl` wheel's `libmkl_rt`.
    Remove this when the wheel links a fast BLAS itself.

    Returns:
        The file loaded, or None when none was found or none is needed (not Linux).
    """
    if sys.platform != "linux":
        return None
    installed = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    names = ["libopenblas.so.0", ctypes.util.find_library("openblas"), *map(str, installed)]
    for name in filter(None, names):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next array, in a process that computes on the CPU.

    By default it gives each large block back to the system and gets the next one as fresh pages, which
    the kernel has to clear: for arrays over 4 MB that costs up to five times what their arithmetic
    does. MLX keeps a cache of its own on GPUs, but none on the CPU (0.32.4). Does nothing where the C
    library is not glibc.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(MALLOC_MMAP_MAX, 0)
        adjust(MALLOC_TRIM_THRESHOLD, -1)  # never: at 2 GB, a step that frees more takes twice as long


def needs_blas() -> bool:
    """Whether MLX would run on reference BLAS here: Linux, no GPU build of MLX, no fast BLAS found."""
    if sys.platform != "linux" or load_blas():
        return False
    from importlib.metadata import distributions

    return not any(found.name.startswith("mlx-cuda") for found in distributions())


def blas_advice() -> str | None:
    """How to get a fast BLAS, in one line, when there is none."""
    if not needs_blas():
        return None
    return (
        "MLX runs on its reference BLAS here: 'apt-get install libopenblas0-pthread' or "
        "'pip install mkl' makes it about thirty times faster"
    )
