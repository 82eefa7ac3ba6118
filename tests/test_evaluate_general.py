"""The general texts: prose, the same every time, and never what was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tasks.evaluate.general import LENGTH_TOKENS, general_rows, general_texts
from tasks.models.folder import ModelFolder
from tasks.prepare.stdlib import stdlib_rows
from tasks.prepare.tokenise import load_tokenizer


def training_rows(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_there_are_enough_texts_of_prose_and_they_are_the_same_again(tmp_path: Path) -> None:
    texts = general_texts(64, training_rows(tmp_path))
    assert len(set(texts)) == 64
    assert texts == general_texts(64, tmp_path)
    assert texts[:16] == general_texts(16, tmp_path)
    assert all(len(text.split()) > 12 and text[0].isupper() for text in texts)
    assert not any(mark in text for text in texts for mark in ("http", "```", "](", "<"))
    built_in = {turn["content"] for row in stdlib_rows() for turn in row.messages}
    assert not built_in & set(texts)


def test_a_text_that_was_trained_on_is_not_used(tmp_path: Path) -> None:
    first, second, third = general_texts(3, training_rows(tmp_path))
    training_rows(
        tmp_path,
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"So:\n\n{first}"}]},
        {"text": second.replace(" ", "  ").replace(". ", ".\n")},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
    )
    remaining = general_texts(64, tmp_path)
    assert remaining[0] == third
    assert not {first, second} & set(remaining)


def test_rows_are_the_beginnings_of_the_texts_all_of_them_supervised(tiny_model: ModelFolder) -> None:
    tokenizer = load_tokenizer(tiny_model.path)
    texts = ["A short one.", "A longer text. " * 20]
    rows = general_rows(texts, tokenizer)
    assert rows.lengths.tolist() == [len(texts[0]) + 1, LENGTH_TOKENS]
    for index, text in enumerate(texts):
        tokens, supervised = rows.row(index)
        assert tokens.tolist() == [*tokenizer.encode(text), 2][:LENGTH_TOKENS]
        assert np.array_equal(supervised, [False] + [True] * (len(tokens) - 1))
