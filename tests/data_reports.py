"""A data report with everything in it, and prepared data around it, for the tests of what shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>alert(1)</script> [bold]loud[/bold] \x1b[31mred\x07 | `code` ![x](//evil) \u202egnorw \ud83d"
)
FILES = (
    "train.jsonl",
    "valid.jsonl",
    "test.jsonl",
    "tokens.safetensors",
    "rejected.jsonl",
    "report.html",
    "inputs.json",
)


def sample_report() -> dict[str, Any]:
    """1,000 rows of several files, some of them hostile; a new one at each call."""
    rows = [8, 131, 260, 214, 139, 88, 51, 30, 17, 9, 6, 4, 2, 0, 1]
    return {
        "source": "rows.jsonl",
        "rows_read": 1000,
        "rows_used": 960,
        "duplicates": 12,
        "rejected": 28,
        "reasons": {
            "too_long": _reason(19, "over data.max_seq_length", "2,311 tokens; data.max_seq_length is 2048"),
            "duplicate": _reason(12, "the same as another row", "the same as line 4"),
            "json": _reason(
                7,
                "broken JSON",
                "not JSON at column 31: Expecting ',' delimiter; mend or remove the line, for example in an "
                "editor that knows JSON",
            ),
            "type": {
                "rows": 2,
                "meaning": "a value of the wrong type",
                "first": [
                    {
                        "file": "b.jsonl",
                        "line": 17,
                        "detail": f"has {HOSTILE}; give a string",
                        "text": HOSTILE,
                    }
                ],
            },
        },
        "notes": {
            "bom": {
                "count": 1,
                "meaning": "a byte order mark, taken off",
                "first": [{"file": "", "line": 1, "detail": ""}],
            },
            "column": {
                "count": 960,
                "meaning": "a column that is not learnt",
                "first": [{"file": "", "line": n, "detail": f"'{HOSTILE}'"} for n in (1, 2)],
            },
        },
        "formats": {"messages": 500, "prompt+completion": 460},
        "splits": {
            "train": _size(768, 73120, 32412),
            "valid": _size(97, 9021, 3980),
            "test": _size(95, 8873, 3902),
        },
        "split_by": "hash",
        "rows_moved_to_fill_a_split": 0,
        "shared_prompts": 3,
        "tokens": 91014,
        "supervised_tokens": 40294,
        "supervised_share": 0.4427,
        "length_tokens": {
            "min": 12,
            "median": 186.0,
            "p95": 470.5,
            "max": 900,
            "histogram": {"edges": [64 * n for n in range(len(rows) + 1)], "rows": rows},
        },
        "max_seq_length": 1024,
        "truncated": 4,
        "template": "the model's own",
        "supervise": "answers",
        "guidance": {
            "goal": "task",
            "rows": 768,
            "minimum": 50,
            "recommended": 1000,
            "advice": "768 training rows will do for a task; a thousand or more teach it reliably.",
        },
        "samples": [
            _sample(
                "", 3, "What is the capital of Assyria?", "Assur at first, then Nineveh.\nIt fell in 612 BC."
            ),
            _sample("b.jsonl", 7, HOSTILE, f"An answer with {HOSTILE}"),
            _sample("", 9, "Sum it up: " + "word " * 300, "Many words."),
        ],
    }


def write_prepared(folder: Path, report: dict[str, Any] | None = None) -> None:
    """Fill a folder as `prepare_data` does."""
    for name in FILES:
        (folder / name).write_text(f"{name} of {(report or {}).get('source')}\n")
    (folder / "report.json").write_text(json.dumps(report or sample_report()))


def _reason(rows: int, meaning: str, detail: str) -> dict[str, Any]:
    first = [
        {
            "file": "",
            "line": 17 + 4 * n,
            "detail": detail,
            "text": f'{{"prompt": "Number {n}", ' + "x" * 70 * n,
        }
        for n in range(min(rows, 5))
    ]
    return {"rows": rows, "meaning": meaning, "first": first}


def _size(rows: int, tokens: int, supervised: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4),
    }


def _sample(file: str, line: int, question: str, answer: str) -> dict[str, Any]:
    pieces = [
        [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False],
        [f"{answer}<|im_end|>", True],
        ["\n", False],
    ]
    return {"file": file, "line": line, "pieces": pieces}
