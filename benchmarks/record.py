"""How every benchmark ends: its figures as one JSON line, and in full under `benchmarks/results/`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

PACKAGES = ("tunesmith", "mlx", "mlx-lm", "mlx-cuda-13", "mlx-cuda-12", "prefect", "mlflow", "optuna")


def record(name: str, figures: Mapping[str, float], quick: bool, details: Any = None) -> None:
    """Print `{"name": …, "figures": {…}}` as the last line; a full (not quick) run is kept in a file too."""
    if not quick:
        whole = {"name": name, "figures": figures, **machine(), "details": details}
        path = RESULTS / f"{name}-{machine_name()}.json"
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        print(f"written: {path}")
    print(json.dumps({"name": name, "figures": figures}))


def machine() -> dict[str, Any]:
    """Date, machine, versions and commit that the figures hold for."""
    import psutil

    from tasks.models.device import device_name

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {
            "device": device_name(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def machine_name() -> str:
    """The GPU's name as a part of file names, or the system's where there is none."""
    from tasks.models.device import device_name, on_gpu

    if not on_gpu():
        return platform.system().lower()
    return re.sub(r"[^a-z0-9]+", "-", device_name().partition(": ")[2].lower())


@cache
def commit() -> str:
    """Of the checkout, "-dirty" where more than results is changed; `COMMIT` where there is no history."""
    if given := os.environ.get("COMMIT"):
        return given
    short = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS}")
    return f"{short}-dirty" if changed else short or "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip()


def kept_cells(file: Path) -> dict[str, dict[str, Any]]:
    """The cells of a file of JSON lines by key, the last of each; a line that was cut off is none."""
    cells = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        cells[cell["key"]] = cell
    return cells


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
