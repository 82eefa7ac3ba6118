"""What `tunesmith evaluate` does: any number of models on the same rows, adapters beside their base."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.resume import settings_of
from flows.targets import FORMS, Target, find_target
from tasks.config import DataSettings, Settings, TrackingSettings, load_settings
from tasks.errors import InputError
from tasks.evaluate.intervals import Interval
from tasks.evaluate.measure import EVALUATION_FILE, TEST, adapter_digest, measure
from tasks.evaluate.side_by_side import compared, numbers
from tasks.home import runs_dir
from tasks.prepare.chats import load_template
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.rows import SPLITS
from tasks.publish import StepOutput
from tasks.tracking import read_record

log = logging.getLogger(__name__)

OVERRIDE = re.compile(r"[a-z]+(\.[a-z_]+)+=")

CHOOSES_ROWS = (
    "source", "subset", "revision", "mapping", "max_rows", "valid_share", "test_share", "seed",
)  # fmt: skip
"""Settings of data that decide which rows are test rows."""


@dataclass(frozen=True)
class Measured:
    """A model and what it does on the rows.

    Attributes:
        name: for people.
        figures: as `tasks.evaluate.measure.measure` wrote them.
        against: what it is compared with, its base, or the first model of the table; None for that itself.
        changes: from that to this model, by figure; empty without one.
        tokens: identifies the rows as tokens: losses compare where it is equal.
        seen: rows measured that this model was trained on, as far as that is known.
    """

    name: str
    figures: Mapping[str, Any]
    against: str | None
    changes: Mapping[str, Interval]
    tokens: str
    seen: int = 0

    def as_json(self) -> dict[str, Any]:
        """For a program: the figures, the rows and answers left out."""
        changes = {
            name: _finite({"change": found.change, "low": found.low, "high": found.high})
            for name, found in self.changes.items()
        }
        return {
            "name": self.name,
            "figures": _finite(numbers(self.figures)),
            "rows": len(self.figures["rows"]),
            "answers": len(self.figures.get("answers", [])),
            "against": self.against,
            "changes": changes,
            "tokens": self.tokens,
            "rows_trained_on": self.seen,
        }


def evaluate_targets(words: Sequence[str], data: str | None, all_rows: bool = False) -> list[Measured]:
    """Measure what is named, and first the bases of adapters; what was measured before is taken from there.

    Settings are those of the first run among the targets, else the defaults, with overrides laid over them.

    Args:
        words: what `flows.targets.find_target` takes, and settings as section.key=value.
        data: what data.source takes; None for the data of the runs.
        all_rows: measure every row of the data instead of the test rows.

    Raises:
        InputError: something named is not there, or no data are named and the runs have none in common.
    """
    overrides = [word for word in words if OVERRIDE.match(word)]
    targets = [find_target(word) for word in words if word not in overrides]
    if not targets:
        raise InputError(f"nothing to evaluate; {FORMS}")
    settings = _settings(targets, data, overrides)
    splits = SPLITS if all_rows else TEST
    bases = [Target(target.model.name, target.model) for target in targets if target.adapter]
    measured: dict[tuple[str, str], Measured] = {}
    for target in [*bases, *targets]:
        key = (target.model.fingerprint, adapter_digest(target.adapter) if target.adapter else "")
        if key not in measured:
            of_base = measured.get((target.model.fingerprint, ""))
            earlier = [of_base] if of_base else [*measured.values()]
            measured[key] = _measured(target, earlier, settings, splits)
    return list(measured.values())


def _measured(
    target: Target, earlier: Sequence[Measured], settings: Settings, splits: Sequence[str]
) -> Measured:
    """Measure a target and compare it with the first of `earlier` that reads the rows as the same tokens."""
    data = prepare_data(settings.data, target.model)
    if target.template is not None and target.template != load_template(data.path):
        log.warning(
            "%s was trained with another chat template than it is measured with; give data.template as it "
            "was in training",
            target.name,
        )
    adapter = None
    if target.adapter:
        adapter = StepOutput(target.adapter, adapter_digest(target.adapter), True, 0.0)
    output = measure(settings.evaluate, target.model, adapter, data, splits)
    figures, seen = output.read_json(EVALUATION_FILE), _rows_seen(target, data, splits)
    base = next((one for one in earlier if one.tokens == data.fingerprint), None)
    changes = compared(base.figures, figures, settings.evaluate.seed) if base else {}
    return Measured(target.name, figures, base.name if base else None, changes, data.fingerprint, seen)


def _settings(targets: Sequence[Target], data: str | None, overrides: Sequence[str]) -> Settings:
    tracking = TrackingSettings()
    kept = [settings_of(tracking, target.run_id, overrides) for target in targets if target.run_id]
    runs = [settings for settings in kept if settings is not None]
    settings = runs[0] if runs else load_settings(None, overrides)
    if data is not None:
        source = DataSettings.model_validate({**settings.data.model_dump(), "source": data})
        return settings.model_copy(update={"data": source})
    if not runs:
        raise InputError("no run among what is evaluated says which data to use; give --data")
    for other in runs[1:]:
        for key in CHOOSES_ROWS:
            ours, theirs = getattr(settings.data, key), getattr(other.data, key)
            if ours != theirs:
                raise InputError(
                    f"the runs have different test rows: data.{key} is {ours} and {theirs}; give --data, of "
                    "rows that none of them was trained on"
                )
    return settings


def _rows_seen(target: Target, data: StepOutput, splits: Sequence[str]) -> int:
    """Rows of the splits that are also in the training split of the target's run, where that is here."""
    if target.run_id is None:
        return 0
    trained = read_record(TrackingSettings(), target.run_id).tags.get("tunesmith.data", "")
    folder = runs_dir() / "steps" / "prepare" / trained
    if not trained or not folder.is_dir():
        return 0
    rows = {row for split in splits for row in _rows(data.path, split)}
    return len(rows & set(_rows(folder, "train")))


def _rows(folder: Path, split: str) -> list[int]:
    """Of each row, a hash of its turns but the system prompt, which is the settings' and not the row's."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [hash(_turns(json.loads(line))) for line in lines]


def _turns(row: Mapping[str, Any]) -> str:
    turns = [turn for turn in row.get("messages", []) if turn["role"] != "system"]
    return str(row.get("text") or json.dumps(turns, sort_keys=True))


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no other numbers."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
