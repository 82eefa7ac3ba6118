"""The steps' packages entered without running their `__init__`, which imports Prefect: plain Python only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import tasks


def without_prefect(steps: Sequence[str]) -> None:
    """From now on `tasks.<step>.<module>` is imported without the step's Prefect task."""
    for step in steps:
        folder = Path(tasks.__file__).parent / step
        spec = spec_from_file_location(
            f"tasks.{step}", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[spec.name] = module_from_spec(spec)  # made, and never run
