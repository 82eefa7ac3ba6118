"""The rows of a split as text, in the forms that mlx-lm takes: chats, or texts where no row is a chat."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.prepare.rows import Row

TEMPLATE_FILE = "chat_template.jinja"


def written_row(row: Row) -> dict[str, Any]:
    """A row as `<split>.jsonl` holds it, which `mlx_lm.lora --data` takes as it is.

    A text is `{"text": …}`. Beside chats it has to have `messages` too, for mlx-lm reads every row in the
    form of the first: it then learns the text as an answer, while Tunesmith learns it plain.
    """
    if not row.messages:
        return {"text": row.text}
    return {"messages": row.messages, "tools": row.tools} if row.tools else {"messages": row.messages}


def read_row(written: dict[str, Any]) -> Row:
    """The row that `written_row` wrote."""
    if "text" in written:
        return Row(0, "text", [], written["text"])
    return Row(0, "messages", written["messages"], tools=written.get("tools"))


def as_answer(text: str) -> list[dict[str, str]]:
    """A text as the answer to nothing: with `--mask-prompt`, mlx-lm renders what stands before it."""
    return [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]


def load_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split of prepared data, in the order of its tokens, each with `messages` or `text`."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def load_template(folder: Path) -> str | None:
    """The chat template of prepared data in Jinja; None where it is the model's own."""
    path = folder / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.exists() else None


def json_line(value: Any) -> str:
    """A value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """One JSON value a line, UTF-8."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(json_line, values))
