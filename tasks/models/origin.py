"""Where a base model comes from and under what licence, as far as its own files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.models.bundled import BUNDLED_REPO, BUNDLED_SOURCE, bundled_gguf
from tasks.models.folder import ModelFolder
from tasks.models.gguf_check import read_texts
from tasks.models.hub import is_hub_name

CARD_FILE = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """What is known of a base model.

    Attributes:
        repo: its name on the hub, owner/name; None when nothing says it.
        licence: the hub's keys `license`, `license_name`, `license_link`, as far as they are known.
    """

    repo: str | None
    licence: Mapping[str, str]


def find_origin(model: ModelFolder) -> Origin:
    """The origin of a base model, from its source's files alone; nothing is asked of the hub."""
    source = Path(model.source).expanduser()
    if model.source == BUNDLED_SOURCE:
        return Origin(BUNDLED_REPO, _gguf_licence(read_texts(bundled_gguf())))
    if source.is_file():
        texts = read_texts(source)
        return Origin(_gguf_repo(texts), _gguf_licence(texts))
    if source.is_dir():
        return Origin(_repo_of_snapshot(source.resolve()), _card_licence(source / CARD_FILE))
    return Origin(model.source, _card_licence(_card_of_hub(model)))


def read_front_matter(text: str) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    if not text.startswith("---\n"):
        return {}
    head = text.removeprefix("---\n").partition("\n---")[0]
    try:
        values = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _card_of_hub(model: ModelFolder) -> Path:
    """The card in the snapshot; a quantised base lies elsewhere, its snapshot still in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if (model.path / CARD_FILE).is_file():
        return model.path / CARD_FILE
    cached = try_to_load_from_cache(model.source, CARD_FILE)
    return Path(cached) if isinstance(cached, str) else model.path / CARD_FILE


def _card_licence(card: Path) -> dict[str, str]:
    if not card.is_file():
        return {}
    values = read_front_matter(card.read_text(encoding="utf-8", errors="replace"))
    return {key: values[key] for key in LICENCE_KEYS if isinstance(values.get(key), str)}


def _repo_of_snapshot(folder: Path) -> str | None:
    """owner/name of a folder in the hub's cache, models--owner--name/snapshots/<commit>."""
    holders = folder.parts[-3:]
    if len(holders) < 3 or holders[1] != "snapshots" or not holders[0].startswith("models--"):
        return None
    return holders[0].removeprefix("models--").replace("--", "/", 1)


def _gguf_licence(texts: Mapping[str, str]) -> dict[str, str]:
    keys = {key: f"general.{key.replace('_', '.')}" for key in LICENCE_KEYS}
    return {key: texts[name] for key, name in keys.items() if texts.get(name)}


def _gguf_repo(texts: Mapping[str, str]) -> str | None:
    """The last two parts of the address of the model's page, as llama.cpp's converter writes it."""
    for key in ("general.source.repo_url", "general.repo_url"):
        repo = "/".join(texts.get(key, "").rstrip("/").split("/")[-2:])
        if is_hub_name(repo):
            return repo
    return None
