"""What the model card of a run's adapter tells, gathered from all that the run has left."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.resume import SETTINGS_FILE
from flows.targets import Target
from tasks.config import Settings, TrackingSettings
from tasks.home import runs_dir
from tasks.models.hub import is_hub_name
from tasks.tracking import read_record, read_text
from tasks.train.step import TRAINING_FILE

SETTINGS_SHOWN = (
    *("method", "num_layers", "targets", "rank", "scale", "dropout", "prompt_tokens"),
    *("optimizer", "learning_rate", "schedule", "warmup_steps", "weight_decay"),
    *("batch_size", "accumulation_steps", "seed"),
)
"""Of `train.*`, what decides the result; the rest is how it was reached."""

FINGERPRINT = re.compile("[0-9a-f]{16}")
"""A file that came from elsewhere must not lead to any other folder."""

OF_LOW_RANK = {"targets", "rank", "scale", "dropout"}


def card_facts(target: Target) -> dict[str, Any]:
    """What a card tells of a target, whatever form it is exported in."""
    assert target.adapter is not None
    training = _json(target.adapter / TRAINING_FILE)
    data = prepared_folder(target.adapter)
    report = _json(data / "report.json") if data else {}
    record = read_record(TrackingSettings(), target.run_id) if target.run_id else None
    settings = run_settings(target)
    source = settings.data.source if settings else ""
    on_hub = is_hub_name(source) and not Path(source).exists()
    title = record.tags.get("mlflow.runName") if record else None
    return {
        "title": title or target.adapter.name,
        "base": target.model.name,
        "metrics": record.metrics if record else {},
        "test_rows": report.get("splits", {}).get("test", {}).get("rows"),
        "data": _data_told(report, source if on_hub else "", target),
        "training": _training_told(training),
        "datasets": [source] if on_hub else [],
    }


def run_settings(target: Target) -> Settings | None:
    """The settings of the run an adapter came from, where they are known."""
    text = read_text(TrackingSettings(), target.run_id, SETTINGS_FILE) if target.run_id else None
    return None if text is None else Settings.model_validate(yaml.safe_load(text))


def prepared_folder(adapter: Path) -> Path | None:
    """The prepared data that an adapter was trained on, where it is there still."""
    known = _json(adapter / TRAINING_FILE).get("inputs", {}).get("data")
    if not isinstance(known, str) or not FINGERPRINT.fullmatch(known):
        return None
    folder = runs_dir() / "steps" / "prepare" / known
    return folder if folder.is_dir() else None


def _data_told(report: Mapping[str, Any], hub_name: str, target: Target) -> dict[str, object]:
    if not report:
        return {}
    splits = report["splits"]
    rows = ", ".join(f"{sizes['rows']:,} {name}" for name, sizes in splits.items())
    facts = {
        "source": hub_name or report["source"],
        "rows": rows,
        "tokens": f"{report['tokens']:,}, of which {report['supervised_tokens']:,} were learnt",
        "learnt": report["supervise"],
        "template": report["template"],
        "system prompt": target.system_prompt,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _training_told(training: Mapping[str, Any]) -> dict[str, object]:
    if not training:
        return {}
    settings = training["inputs"]["settings"]
    low_rank, soft = settings["method"] in ("lora", "dora"), settings["method"] == "soft-prompt"
    skipped = (set() if low_rank else OF_LOW_RANK) | ({"num_layers"} if soft else {"prompt_tokens"})
    facts = {
        name: ", ".join(value) if isinstance(value := settings[name], list) else value
        for name in SETTINGS_SHOWN
        if name not in skipped and settings.get(name) is not None
    }
    if low_rank and settings.get("scale") is None:
        facts["alpha"] = settings["alpha"]
    return {
        **{name.replace("_", " "): value for name, value in facts.items()},
        "steps": f"{training['steps']:,}, the best after {training['best_step']:,}",
        "trained tokens": f"{training['trained_tokens']:,}",
        "trainable parameters": f"{training['trainable_parameters']:,}",
        "validation loss": f"{training['val_loss_before']:.4f}, at best {training['best_val_loss']:.4f}",
    }


def _json(path: Path) -> dict[str, Any]:
    """A JSON file that may not be there."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
