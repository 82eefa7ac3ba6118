"""Import this first: BLAS before MLX, and the engine even where Prefect is not installed.

A machine that is only borrowed for its GPU has no need of orchestration and tracking. Each step's
`__init__` imports Prefect; where that is missing the packages are entered without running it, and the plain
Python beside it is what it is everywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import tasks

STEPS = ("models", "prepare", "train")

if importlib.util.find_spec("prefect") is None:
    for step in STEPS:
        package = ModuleType(f"tasks.{step}")
        package.__path__ = [str(Path(tasks.__file__).parent / step)]
        sys.modules[package.__name__] = package

from tasks.models.mlx_lm_import import import_mlx_lm  # noqa: E402  (only now can it be found)

import_mlx_lm()
