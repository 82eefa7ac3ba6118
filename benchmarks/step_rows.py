"""The rows that both sides train on: made for a length and a share of prompt, or real chats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare_engine  # noqa: F401
import numpy as np
from step_models import BUNDLED, config_of
from step_trainers import Row

from tasks.prepare.splits import TokenRows, load_splits

ORDINARY = 3
"""The first token id drawn at random: those below are control tokens in these vocabularies."""


@dataclass(frozen=True)
class Chats:
    """Prepared rows, and the same rows as mlx-lm reads them from the same folder.

    Attributes:
        their_train, their_valid: mlx-lm's own data sets, prompts masked.
    """

    train: TokenRows
    valid: TokenRows
    their_train: Any
    their_valid: Any


def made_rows(model: str, count: int, length: int, prompt_percent: int) -> TokenRows:
    """Rows of `length` + 1 tokens, which give `length` positions, the last of them supervised.

    For the bundled model cut from the standard library's sources as its tokenizer reads them, else drawn.
    """
    size = length + 1
    ids = _text(count * size) if model == BUNDLED else _drawn(model, count * size)
    first = 1 + round(prompt_percent / 100 * length)
    supervised = [place >= first for place in range(size)]
    return TokenRows.from_rows([(ids[at : at + size], supervised) for at in range(0, count * size, size)])


def chats(valid_rows: int) -> Chats:
    """The built-in chats about Python's standard library, prepared for the bundled model.

    Args:
        valid_rows: so many of the validation rows, for either side.
    """
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.utils import load_tokenizer

    from tasks.config import DataSettings, ModelSettings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import prepare_data

    model = resolve_model(ModelSettings())
    folder = prepare_data(DataSettings(), model).path
    tokenizer = load_tokenizer(model.path)
    splits = load_splits(folder)

    def theirs(name: str, count: int) -> Any:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = CacheDataset(ChatDataset([json.loads(line) for line in lines], tokenizer, mask_prompt=True))
        for index in range(len(rows)):
            rows[index]  # tokenised now, not in the first step that needs it
        return rows

    train, valid = splits["train"], splits["valid"].first(valid_rows)
    return Chats(train, valid, theirs("train", len(train)), theirs("valid", valid_rows))


def their_rows(rows: TokenRows, indices: np.ndarray[Any, Any]) -> list[Row]:
    """Some rows as mlx-lm has them: supervised from a place on, to the end.

    What comes after the last supervised token is left out: nothing that is supervised depends on it.
    """
    found = []
    for index in indices:
        tokens, supervised = rows.row(int(index))
        places = np.flatnonzero(supervised)
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            raise ValueError(f"row {index} is supervised in several places, which mlx-lm cannot express")
        found.append((tokens[: last + 1].tolist(), first))
    return found


def positions(rows: TokenRows) -> int:
    """Places where a token is predicted from those before it, supervised or not; padding is none."""
    return len(rows.tokens) - len(rows)


def _drawn(model: str, count: int) -> list[int]:
    drawn: list[int] = (
        np.random.default_rng(0).integers(ORDINARY, config_of(model)["vocab_size"], count).tolist()
    )
    return drawn


def _text(count: int) -> list[int]:
    from tasks.config import ModelSettings
    from tasks.models.resolve import resolve_model
    from tasks.prepare.tokenise import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(ModelSettings()).path)
    ids: list[int] = []
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"the standard library's sources have {len(ids)} tokens, {count} are needed")
