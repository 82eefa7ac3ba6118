"""Rows over the longest length: a prompt may be cut at its beginning, an answer never."""

from __future__ import annotations

from dataclasses import replace

from tasks.prepare.rows import Row
from tasks.prepare.tokenise import ChatEncoder


def cut_prompts(row: Row, encoder: ChatEncoder, limit: int) -> Row | None:
    """The row with the beginnings of its questions cut until it has at most `limit` tokens.

    The earliest question is cut first, and the end of each, which stands nearest to its answer, is
    kept. None where the answers leave no room.
    """
    turns = [dict(turn) for turn in row.messages]
    shorter = replace(row, messages=turns)
    for turn in turns:
        while turn["role"] in ("user", "tool") and (excess := _length(shorter, encoder) - limit) > 0:
            rest = encoder.shorten(turn["content"], excess)
            if not rest.strip() or rest == turn["content"]:
                break
            turn["content"] = rest
    return shorter if row.messages and _length(shorter, encoder) <= limit else None


def _length(row: Row, encoder: ChatEncoder) -> int:
    return int(encoder.encode(encoder.lay_out([row])).lengths[0])
