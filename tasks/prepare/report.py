"""The data report: what was read, what of it is used, and what a model will learn from it."""

from __future__ import annotations

import itertools
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.config import DataSettings
from tasks.prepare.choose import Unused
from tasks.prepare.rows import Row
from tasks.prepare.splits import TokenRows
from tasks.prepare.tokenise import ChatEncoder

SAMPLES = 3


def data_report(
    data: DataSettings,
    used: Sequence[Row],
    unused: Sequence[Unused],
    splits: dict[str, TokenRows],
) -> dict[str, Any]:
    """Counts of rows and tokens, as plain values.

    `rows_read` = `rows_used` + `duplicates` + `rejected`; `rejected` are the rows over `max_seq_length`
    and those not chosen under `max_rows`, told apart in `unused_by_reason`. Lengths are in tokens.
    """
    reasons = Counter(one.kind for one in unused)
    sizes = {name: _tokens(rows) for name, rows in splits.items()}
    lengths = np.concatenate([rows.lengths for rows in splits.values()])
    report = {
        "source": Path(data.source).name,
        "rows_read": len(used) + len(unused),
        "rows_used": len(used),
        "duplicates": reasons["duplicate"],
        "rejected": len(unused) - reasons["duplicate"],
        "unused_by_reason": dict(sorted(reasons.items())),
        "formats": dict(sorted(Counter(row.format for row in used).items())),
        "splits": sizes,
        **_sum(list(sizes.values())),
        "length_tokens": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "max_seq_length": data.max_seq_length,
    }
    return {**report, "python": platform.python_version()} if data.source == "stdlib" else report


def sample(
    row: Row, encoder: ChatEncoder, tokens: Sequence[int], supervised: Sequence[bool]
) -> dict[str, Any]:
    """A row as rendered, and the texts of its supervised stretches, decoded from their token ids."""
    learnt = [
        encoder.decode([token for token, _ in run])
        for is_learnt, run in itertools.groupby(
            zip(tokens, supervised, strict=True), key=lambda pair: pair[1]
        )
        if is_learnt
    ]
    rendered = "".join(piece.text for piece in encoder.template.pieces(row.messages))
    return {"line": row.line, "rendered": rendered, "supervised": learnt}


def _tokens(rows: TokenRows) -> dict[str, Any]:
    return {"rows": len(rows), **_share(len(rows.tokens), int(rows.supervised.sum()))}


def _sum(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    return _share(sum(one["tokens"] for one in sizes), sum(one["supervised_tokens"] for one in sizes))


def _share(tokens: int, supervised: int) -> dict[str, Any]:
    share = round(supervised / tokens, 4) if tokens else 0.0
    return {"tokens": tokens, "supervised_tokens": supervised, "supervised_share": share}
