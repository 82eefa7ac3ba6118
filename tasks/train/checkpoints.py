"""Checkpoints: a folder a saved step, whole or not there, from which training goes on byte for byte.

    mlruns/checkpoints/<fingerprint of the training's inputs>/step-00000120/
        adapters.safetensors    the trained weights
        optimizer.safetensors   the optimizer's state
        best.safetensors        the best adapter so far, where it is not this step's
        state.json              `Training`: step, place in the data, figures, history
        SHA256SUMS              of the files above; `sha256sum -c` reads it

A folder is written aside, synced, renamed, and its parent synced. The last three stay. Each holds
the best adapter too, so that the best stays however old it is, and any one is enough to go on from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from filelock import FileLock, Timeout

from tasks.config import TrainSettings
from tasks.home import runs_dir
from tasks.progress import progress
from tasks.publish import publishing, remove_drafts, sync, write_json
from tasks.train.state import Training

log = logging.getLogger(__name__)

KEPT = 3

WEIGHTS_FILE = "adapters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
OWNER_FILE = "owner.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was read back of one saved step."""

    path: Path
    training: Training
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]


class Checkpoints:
    """The checkpoints of one run: saved when due, found again at the next start."""

    def __init__(self, folder: Path, settings: TrainSettings) -> None:
        """Keep them in `folder`, which belongs to this process alone (see `owned`)."""
        self.folder = folder
        self._settings = settings
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether `steps_per_save` updates or `minutes_per_save` minutes have passed."""
        every = self._settings.steps_per_save
        minutes = (time.monotonic() - self._saved_at) / 60
        return (every is not None and step % every == 0) or minutes >= self._settings.minutes_per_save

    def save(
        self, training: Training, weights: Mapping[str, mx.array], optimizer: Mapping[str, mx.array]
    ) -> Path:
        """Write the checkpoint of `training.step`, if it is not there, and drop the oldest of four."""
        target = self.folder / f"step-{training.step:08d}"
        if not target.is_dir():
            with publishing(target) as draft:
                _save_arrays(draft / WEIGHTS_FILE, weights)
                _save_arrays(draft / OPTIMIZER_FILE, optimizer)
                if _has_best_file(training):
                    _save_arrays(draft / BEST_FILE, training.best_weights)
                write_json(draft / STATE_FILE, training.plain())
                _write_sums(draft)
        for old in self._saved()[KEPT:]:
            _remove(old)
        self._saved_at = time.monotonic()
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; those that are not are named in a warning and set aside."""
        for path in self._saved():
            try:
                return _read(path)
            except _DamagedError as fault:
                log.warning("checkpoint %s is damaged and passed over: %s", path, fault)
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def _saved(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)


def checkpoints_folder(fingerprint: str) -> Path:
    """Where the checkpoints of the training with this fingerprint lie."""
    return runs_dir() / "checkpoints" / fingerprint


@contextmanager
def owned(folder: Path, owner: str) -> Iterator[None]:
    """Hold a checkpoint folder for the block, and clear it of drafts that killed processes left.

    When another process holds it, it is training the very same adapter: the person wants that
    adapter, not a second training nor an error, so this waits, saying for whom. When the other
    finishes, its adapter is found published; when it dies, the system frees the lock and training
    goes on from its last checkpoint.

    Args:
        owner: what the holder is called in the message of one who waits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = _holder(folder)
        log.warning("%s is training this very adapter: waiting for it (Ctrl-C stops waiting)", holder)
        with progress(f"waiting for {holder}"):
            lock.acquire()
    try:
        folder.mkdir(exist_ok=True)
        remove_drafts(folder)
        here = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(folder / OWNER_FILE, {"owner": owner, **here})
        yield
    finally:
        (folder / OWNER_FILE).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        lock.release()


def remove_checkpoints(folder: Path) -> None:
    """Drop all checkpoints of a run whose adapter is published: it is the best of them, and done."""
    shutil.rmtree(folder, ignore_errors=True)


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


def _has_best_file(training: Training) -> bool:
    return 0 < training.best_step < training.step


def _save_arrays(path: Path, arrays: Mapping[str, mx.array]) -> None:
    """Equal arrays give equal bytes: the order of the names decides the file's layout."""
    mx.save_safetensors(str(path), dict(sorted(arrays.items())))


def _write_sums(folder: Path) -> None:
    lines = [f"{_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint, each file only after its checksum held.

    Raises:
        _DamagedError: a file is missing, not listed, or not what was written.
    """
    try:
        lines = (path / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        raise _DamagedError(f"{SUMS_FILE} is missing or not text") from None
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def checked(name: str) -> Path:
        if not (path / name).is_file() or name not in sums:
            raise _DamagedError(f"{name} is missing")
        if _digest(path / name) != sums[name]:
            raise _DamagedError(f"{name} is not what was written (SHA-256 differs)")
        return path / name

    state = json.loads(checked(STATE_FILE).read_text(encoding="utf-8"))
    training = Training.from_plain(state)
    weights = _load_arrays(checked(WEIGHTS_FILE))
    optimizer = _load_arrays(checked(OPTIMIZER_FILE))
    if _has_best_file(training):
        training.best_weights = _load_arrays(checked(BEST_FILE))
    elif training.best_step:
        training.best_weights = weights
    return Checkpoint(path, training, weights, optimizer)


def _load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays by name, sorted and read now: the file may be gone before they are used."""
    arrays: dict[str, Any] = mx.load(str(path))  # type: ignore[assignment]
    mx.eval(list(arrays.values()))
    return dict(sorted(arrays.items()))


def _remove(path: Path) -> None:
    """Remove a checkpoint so that one killed in the middle leaves a draft, not half a checkpoint."""
    gone = path.with_name(f".{path.name}.old.draft")
    path.rename(gone)
    sync(path.parent)
    shutil.rmtree(gone)


def _holder(folder: Path) -> str:
    try:
        known = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f"{known['owner']} (process {known['pid']} on {known['host']}, since {known['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
