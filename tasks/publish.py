"""Step outputs on disk: named by the fingerprint of their inputs, published by one rename or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tasks.changes import FIRST, why_anew
from tasks.home import runs_dir

log = logging.getLogger(__name__)

INPUTS_FILE = "inputs.json"

WHOLE = "all"
"""The `part` of a step's inputs that is all of it, where it is made of parts."""

FORCED = "--force"
"""Why a step was run whose inputs had not changed."""


@dataclass(frozen=True)
class StepOutput:
    """What passes between steps: a published folder and the fingerprint of the inputs it was made from.

    Attributes:
        why: what had changed, where it was not reused.
    """

    path: Path
    fingerprint: str
    reused: bool
    seconds: float
    why: str = ""

    def read_json(self, name: str) -> Any:
        """The parsed JSON file `name` of the folder."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def run_step(step: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> StepOutput:
    """Make a step's output once: a folder that exists already under the same inputs is used as it is.

    Args:
        step: the step's name, which is also its folder under `tasks/` and under `mlruns/steps/`.
        inputs: everything the output depends on, as plain JSON values; the step's code is added.
        make: writes the output into the empty folder it is given.
    """
    known = known_inputs(step, inputs)
    target = output_folder(step, inputs)
    started = time.perf_counter()
    there, forced = target.is_dir(), is_forced(step, target)
    if there and not forced:
        log.info("%s: inputs unchanged, reusing %s", step, target)
        return StepOutput(target, target.name, True, time.perf_counter() - started)
    why = FORCED if there else why_anew(step, known, list(target.parent.glob(f"*/{INPUTS_FILE}")))
    if why != FIRST and known.get("part", WHOLE) == WHOLE:
        log.info("%s: to be made again: %s", step, why)
    with publishing(target, replace=forced) as draft:
        make(draft)
        write_json(draft / INPUTS_FILE, known)
    _made_anew(target)
    return StepOutput(target, target.name, False, time.perf_counter() - started, why)


@contextmanager
def forcing(steps: Collection[str]) -> Iterator[None]:
    """Make the outputs of these steps anew in the block, each once, though their inputs are unchanged."""
    before = _forced.set(_Forced(frozenset(steps), set()))
    try:
        yield
    finally:
        _forced.reset(before)


def is_forced(step: str, target: Path | None = None) -> bool:
    """Whether a step is to be done anew, unless its output `target` has been in this block."""
    forced = _forced.get()
    return forced is not None and step in forced.steps and target not in forced.done


def output_folder(step: str, inputs: Mapping[str, Any]) -> Path:
    """Where `run_step` publishes; the folder's name is the fingerprint of the inputs and the step's code."""
    return runs_dir() / "steps" / step / fingerprint(known_inputs(step, inputs))


def known_inputs(step: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a step's output depends on: its inputs and its code."""
    return {**inputs, "code": code_version(step)}


def fingerprint(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_version(step: str) -> str:
    """A digest of the code and page templates of `tasks/<step>/`: a changed step reuses no old outputs.

    Its task for Prefect decides when it is tried again and how long it may take, and not what it makes.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent / step
    for source in sorted([*folder.rglob("*.py"), *folder.rglob("*.jinja")]):
        if source in (folder / "__init__.py", folder / "task.py"):
            continue
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def publishing(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a draft folder beside `target`; on success sync it and rename it into place.

    On any exception the draft is removed and `target` does not appear. When another process has
    published the same target meanwhile, its folder is kept: equal inputs give equal outputs. With
    `replace` a folder that is there gives way, once the draft is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, aside = _draft_of(target), _draft_of(target)
    draft.mkdir()
    try:
        yield draft
        for path in draft.rglob("*"):
            sync(path)
        sync(draft)
        if replace and target.is_dir():
            target.rename(aside)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove the drafts of outputs `name` in `folder` that killed processes left behind.

    Only for whoever knows that nobody else writes them now, as the holder of their lock does.
    """
    for draft in folder.glob(f".{name}.*.draft"):
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON ending in a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file's or folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Forced:
    steps: frozenset[str]
    done: set[Path]


_forced: ContextVar[_Forced | None] = ContextVar("forced", default=None)


def _made_anew(target: Path) -> None:
    if forced := _forced.get():
        forced.done.add(target)


def _draft_of(target: Path) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.draft"
