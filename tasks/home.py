"""Where things are kept: one folder for runs, one cache for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def runs_dir() -> Path:
    """The folder of databases, artifacts and step outputs; never the working directory's by chance.

    `TUNESMITH_HOME` if set, else `mlruns/` of the checkout this code runs from, else the user's
    data folder for an installed copy.
    """
    if given := os.environ.get("TUNESMITH_HOME"):
        return Path(given).expanduser().resolve()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / "mlruns"
    import platformdirs

    return Path(platformdirs.user_data_dir("tunesmith", appauthor=False))


def cache_dir() -> Path:
    """The folder of imported base models: `TUNESMITH_CACHE` if set, else the user's cache folder."""
    if given := os.environ.get("TUNESMITH_CACHE"):
        return Path(given).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tunesmith", appauthor=False))
