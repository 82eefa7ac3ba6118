"""What an adapter is used with, kept beside its weights: base model, chat template, system prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.config import ModelSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import load_template
from tasks.publish import INPUTS_FILE, StepOutput, write_json

USE_FILE = "use.json"


@dataclass(frozen=True)
class Use:
    """What stands around an adapter when it answers.

    Attributes:
        base_name, base_fingerprint: of the base model.
        base: the settings that named the base; None when they are not known.
        template: the chat template in Jinja; None for the base's own.
        system_prompt: put before chats that have none, as in training; None for no such.
    """

    base_name: str
    base_fingerprint: str
    base: ModelSettings | None
    template: str | None
    system_prompt: str | None


def write_use(folder: Path, model: ModelFolder, data: StepOutput) -> None:
    """Write `use.json` into an adapter's folder: trained on `model` with the prepared `data`."""
    settings = None if model.settings is None else _from_anywhere(model.settings).model_dump(mode="json")
    base = {"name": model.name, "fingerprint": model.fingerprint, "settings": settings}
    written = {"base": base, "template": load_template(data.path), "system_prompt": _system_prompt(data)}
    write_json(folder / USE_FILE, written)


def read_use(folder: Path) -> Use | None:
    """What `write_use` wrote; None where there is no such file.

    Raises:
        InputError: the file is not as it was written.
    """
    path = folder / USE_FILE
    if not path.is_file():
        return None
    try:
        written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        base = written["base"]
        known = base["settings"]
        settings = None if known is None else ModelSettings.model_validate(known)
        texts = written["template"], written["system_prompt"]
        return Use(base["name"], base["fingerprint"], settings, *texts)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{path}: {error}; fetch the adapter again") from None


def _from_anywhere(settings: ModelSettings) -> ModelSettings:
    """The settings with a source that is a path made absolute."""
    path = Path(settings.source).expanduser()
    if settings.source == ModelSettings().source or not path.exists():
        return settings
    return settings.model_copy(update={"source": str(path.resolve())})


def _system_prompt(data: StepOutput) -> str | None:
    if not (data.path / INPUTS_FILE).is_file():
        return None
    prompt: str | None = data.read_json(INPUTS_FILE).get("data", {}).get("system_prompt")
    return prompt
