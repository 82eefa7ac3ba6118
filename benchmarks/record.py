"""How every benchmark ends: its figures as one JSON line, and in full under `benchmarks/results/`."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: Mapping[str, float], quick: bool, details: Any = None) -> None:
    """Print `{"name": …, "figures": {…}}` as the last line; a full (not quick) run is kept in a file too."""
    if not quick:
        whole = {"name": name, "figures": figures, **machine(), "details": details}
        path = RESULTS / f"{name}-{platform.system().lower()}.json"
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        print(f"written: {path}")
    print(json.dumps({"name": name, "figures": figures}))


def machine() -> dict[str, Any]:
    """Date, machine and versions that the figures hold for."""
    import psutil

    from tasks.models.device import device_name

    packages = ("tunesmith", "mlx", "mlx-lm", "prefect", "mlflow", "optuna")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": device_name(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
