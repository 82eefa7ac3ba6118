"""Import this first: BLAS before MLX, and the engine even where Prefect is not installed.

A machine that is only borrowed for its GPU has no need of orchestration and tracking. Each step's
`__init__` imports Prefect; where that is missing the packages are entered without running it, and the plain
Python beside it is what it is everywhere.
"""

from __future__ import annotations

import importlib.util

from bare_steps import without_prefect

import tasks  # noqa: F401  (sets the process up before MLX is imported)

if importlib.util.find_spec("prefect") is None:
    without_prefect(("models", "prepare", "train"))

from tasks.models.mlx_lm_import import import_mlx_lm

import_mlx_lm()
