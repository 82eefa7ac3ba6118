"""Why a step has to run: what sets its inputs apart from those of the outputs that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = {"prepare": "data", "train": "train", "evaluate": "evaluate", "fuse": "fuse"}
"""The settings of a step, by which a person knows them."""

IN_WORDS = {
    "model": "another base model",
    "data": "other prepared data",
    "adapter": "another adapter",
    "code": "Tunesmith's own code of this step has changed",
    "tokenizer": "another tokenizer",
    "source": "other rows",
    "template": "another chat template",
    "texts": "other general texts",
    "metrics": "other metrics of your own",
    "from_adapter": "train.from_adapter has other weights",
}
"""Inputs that are digests: their values say nothing to a person."""

MOST_LOOKED_AT = 200
"""Earlier outputs, the newest; a search leaves thousands."""

MOST_TOLD = 4

FIRST = "nothing like it was made before"


def why_anew(step: str, inputs: Mapping[str, Any], earlier: Sequence[Path]) -> str:
    """What a person changed since the output nearest to these inputs: "train.rank 8 → 16".

    Args:
        inputs: of the step, its code among them.
        earlier: the files with the inputs of other outputs of the step.
    """
    newest = sorted(earlier, key=_changed_s, reverse=True)[:MOST_LOOKED_AT]
    ours = _flat(inputs)
    differences = [_different(_flat(known), ours) for known in _read(newest) if _same_part(known, inputs)]
    if not differences:
        return FIRST
    told = _told(step, min(differences, key=len))
    more = len(told) - MOST_TOLD
    return ", ".join(told[:MOST_TOLD]) + (f" and {more} more" if more > 0 else "")


def _same_part(known: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
    """A step that measures in parts compares each with its like, and not a tuned model with its base."""
    sides = [each.get("adapter") is None for each in (known, inputs)]
    return known.get("part") == inputs.get("part") and known.keys() == inputs.keys() and sides[0] == sides[1]


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*new, *old])
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _told(step: str, changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Each change in words, settings of a person first, the same words once."""
    told = {_words(step, name, *values): None for name, values in changes.items()}
    return sorted(told, key=lambda text: " → " not in text)


def _words(step: str, name: str, old: Any, new: Any) -> str:
    section, _, key = name.partition(".")
    if name == "source.files":
        return "; ".join(_files(old or [], new or []))
    if section == "settings" or (section == "data" and key):
        return f"{SECTIONS.get(step, step)}.{key} {_value(old)} → {_value(new)}"
    if section in IN_WORDS:
        return IN_WORDS[section]
    prefix = "" if section == "device" else f"{SECTIONS.get(step, step)}."
    return f"{prefix}{name} {_value(old)} → {_value(new)}"


def _files(old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Of files by name, suffix, split and digest: which are new, gone or changed."""
    before, after = ({file[0] or "the file of data.source": file for file in files} for files in (old, new))
    for name in {**before, **after}:
        if name not in before:
            yield f"{name} is new"
        elif name not in after:
            yield f"{name} is gone"
        elif before[name] != after[name]:
            yield f"{name} has changed"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).strip('"')


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Those that can be read: another process may be removing one."""
    for file in files:
        try:
            yield json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue


def _changed_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
