"""What measured runs say about the replay, kept in the cache for this machine, backend and version of MLX.

<cache>/memory/<device and version>.json    ratios of the latest runs, measured over predicted
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from tasks.home import cache_dir
from tasks.models.device import device_name
from tasks.publish import fingerprint, write_json

if TYPE_CHECKING:
    from tasks.train.memory.estimate import Breakdown, MemoryEstimate

CHANGING = ("gradients", "activations", "logits")
"""What the replay predicts; everything else is counted."""

LEAST_RUNS, MOST_RUNS = 3, 64
LOWEST, HIGHEST = 0.8, 1.25
"""A ratio outside says that something else was measured, as another model in the same process."""


@dataclass(frozen=True)
class Calibration:
    """How measured peaks relate to replayed ones.

    Attributes:
        ratio: of what changes in a step, measured over replayed.
    """

    ratio: float = 1.0

    def applied(self, replayed: Breakdown) -> Breakdown:
        """The breakdown with the difference as slack."""
        changing = sum(getattr(replayed, part) for part in CHANGING)
        return replace(replayed, slack=round((self.ratio - 1) * changing))


def calibration() -> Calibration:
    """This machine's: the median of what its runs measured, within bounds; none before three of them."""
    ratios = _ratios(_file())
    if len(ratios) < LEAST_RUNS:
        return Calibration()
    return Calibration(min(max(statistics.median(ratios), LOWEST), HIGHEST))


def learn(estimate: MemoryEstimate, measured_bytes: int) -> None:
    """Note what a finished run took in the phase that was predicted to be its highest."""
    peak = replace(estimate.at_peak, slack=0)
    changing = sum(getattr(peak, part) for part in CHANGING)
    if not changing:
        return
    ratio = (measured_bytes - (peak.bytes - changing)) / changing
    if not LOWEST <= ratio <= HIGHEST:
        return
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")
        write_json(draft, [*_ratios(path), ratio][-MOST_RUNS:])
        os.replace(draft, path)


def _ratios(path: Path) -> list[float]:
    with suppress(OSError, ValueError):
        return [float(ratio) for ratio in json.loads(path.read_text(encoding="utf-8"))]
    return []


def _file() -> Path:
    known = {"device": device_name(), "mlx": importlib.metadata.version("mlx")}
    return cache_dir() / "memory" / f"{fingerprint(known)}.json"
