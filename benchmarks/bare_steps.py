"""The steps' packages entered without running their `__init__`, which imports Prefect: plain Python only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import tasks


def without_prefect(steps: Sequence[str]) -> None:
    """From now on `tasks.<step>.<module>` is imported without the step's Prefect task."""
    for step in steps:
        package = ModuleType(f"tasks.{step}")
        package.__path__ = [str(Path(tasks.__file__).parent / step)]
        sys.modules[package.__name__] = package
