"""What measured runs say about the replay, kept in the cache for this machine, backend and version of MLX.

<cache>/memory/<device and version>.json          ratios of the latest runs, measured over predicted
<cache>/memory/<device and version>.probe.json    the ratio of a tiny one, before there are others
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
        return replace(replayed, slack=round((self.ratio - 1) * changing_bytes(replayed)))


def changing_bytes(replayed: Breakdown) -> int:
    """Of what the replay predicts."""
    return sum(getattr(replayed, part) for part in CHANGING)


def calibration() -> Calibration:
    """This machine's: the median of what its runs measured, within bounds, or what the probe did before."""
    ratios = _ratios(_file())
    if len(ratios) < LEAST_RUNS:
        return Calibration(min(max([1.0, *_ratios(_probe_file())]), HIGHEST))
    return Calibration(min(max(statistics.median(ratios), LOWEST), HIGHEST))


def probed() -> bool:
    """Whether a tiny run has been measured on this machine."""
    return _probe_file().is_file()


def note_probe(ratio: float) -> None:
    """Keep what it measured."""
    _write(_probe_file(), [ratio])


def learn(estimate: MemoryEstimate, measured_bytes: int) -> None:
    """Note what a finished run took in the phase that was predicted to be its highest."""
    peak = replace(estimate.at_peak, slack=0)
    changing = changing_bytes(peak)
    if not changing:
        return
    ratio = (measured_bytes - (peak.bytes - changing)) / changing
    if not LOWEST <= ratio <= HIGHEST:
        return
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        _write(path, [*_ratios(path), ratio][-MOST_RUNS:])


def _write(path: Path, ratios: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")
    write_json(draft, ratios)
    os.replace(draft, path)


def _ratios(path: Path) -> list[float]:
    with suppress(OSError, ValueError):
        return [float(ratio) for ratio in json.loads(path.read_text(encoding="utf-8"))]
    return []


def _file() -> Path:
    known = {"device": device_name(), "mlx": importlib.metadata.version("mlx")}
    return cache_dir() / "memory" / f"{fingerprint(known)}.json"


def _probe_file() -> Path:
    return _file().with_suffix(".probe.json")
