"""The data report: what was read, what of it is used, and what a model will learn from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.config import DataSettings
from tasks.prepare.choose import TRAIN
from tasks.prepare.rows import SPLITS
from tasks.prepare.spool import Dealt

HISTOGRAM_BARS = 24

GUIDANCE = {"style": (10, 100), "task": (50, 500), "domain": (100, 1000), "broad": (500, 5000)}
"""Training rows: at the least, and recommended, by `data.goal`."""


def token_figures(data: DataSettings, dealt: Dealt) -> dict[str, Any]:
    """Rows, tokens and supervised tokens of each split, lengths, and advice on the number of rows."""
    train = int((dealt.splits == TRAIN).sum())
    return {
        "splits": {
            name: {
                "rows": int((mine := dealt.splits == index).sum()),
                **_share(int(dealt.lengths[mine].sum()), int(dealt.supervised[mine].sum())),
            }
            for index, name in enumerate(SPLITS)
        },
        **_share(int(dealt.lengths.sum()), int(dealt.supervised.sum())),
        "shared_prompts": _shared_prompts(dealt),
        "length_tokens": _lengths(dealt.lengths),
        "max_seq_length": data.max_seq_length,
        "supervise": data.supervise,
        "guidance": guidance(data.goal, train),
    }


def guidance(goal: str, rows: int) -> dict[str, Any]:
    """Whether so many training rows are enough for a goal; `advice` is empty when they are."""
    minimum, recommended = GUIDANCE[goal]
    advice = ""
    if rows < recommended:
        few = f"less than the {minimum} it takes at least" if rows < minimum else "which may do"
        count = f"{rows} training row{'s' * (rows != 1)}"
        advice = f"{count} for data.goal={goal}, {few}; {recommended} or more are recommended"
    return {
        "goal": goal,
        "rows": rows,
        "minimum": minimum,
        "recommended": recommended,
        "advice": advice,
    }


def _shared_prompts(dealt: Dealt) -> int:
    """Held-out rows whose prompt is also that of a training row: their loss flatters the model."""
    train = dealt.splits == TRAIN
    return int(np.isin(dealt.prompts[~train], dealt.prompts[train]).sum())


def _lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = _round_up((longest - shortest + 1) / HISTOGRAM_BARS)
    edges = np.arange(shortest // width * width, longest + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    return {
        "min": shortest,
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "max": longest,
        "histogram": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def _round_up(width: float) -> int:
    """The next of 1, 2, 4, 5, 8, 10, 20, …: edges that a person can read."""
    power = 1
    while True:
        for step in (1, 2, 4, 5, 8):
            if step * power >= width:
                return step * power
        power *= 10


def _share(tokens: int, supervised: int) -> dict[str, Any]:
    share = round(supervised / tokens, 4) if tokens else 0.0
    return {"tokens": tokens, "supervised_tokens": supervised, "supervised_share": share}
