"""The rows of a split as text, in mlx-lm's chat form: `{"messages": [...]}`, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.prepare.rows import Messages


def save_rows(folder: Path, split: str, chats: Iterable[Messages]) -> None:
    """Write `<split>.jsonl`, which `mlx_lm.lora --data` takes as it is."""
    write_jsonl(folder / f"{split}.jsonl", ({"messages": chat} for chat in chats))


def load_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split of prepared data, each with its `messages`, in the order of its tokens."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """One JSON value a line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
