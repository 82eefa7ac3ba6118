"""Which rows are used, and which split each goes to: functions of content and seed, never of position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.config import DataSettings
from tasks.prepare.rows import Row, hash_share


@dataclass(frozen=True)
class Unused:
    """A row that was read and is not used.

    Attributes:
        kind: "duplicate", "not_chosen" or "too_long".
        detail: the line it repeats, or the limit it is over.
    """

    row: Row
    kind: str
    detail: str


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], list[Unused]]:
    """Keep the first of the rows that differ in white space at most."""
    first: dict[str, Row] = {}
    unused = []
    for row in rows:
        kept = first.setdefault(row.identity, row)
        if kept is not row:
            unused.append(Unused(row, "duplicate", f"the same as line {kept.line}"))
    return list(first.values()), unused


def choose_rows(rows: Sequence[Row], max_rows: int | None, seed: int) -> tuple[list[Row], list[Unused]]:
    """Keep `max_rows` rows, those of the smallest hash, in their order; all when None.

    Raising `max_rows` adds rows to those chosen before.
    """
    if max_rows is None or len(rows) <= max_rows:
        return list(rows), []
    by_hash = sorted(rows, key=lambda row: (hash_share(row.identity, seed, "choose"), row.identity))
    chosen = {row.identity for row in by_hash[:max_rows]}
    unused = [
        Unused(row, "not_chosen", f"data.max_rows is {max_rows}")
        for row in rows
        if row.identity not in chosen
    ]
    return [row for row in rows if row.identity in chosen], unused


def assign_splits(rows: Sequence[Row], data: DataSettings) -> tuple[dict[str, list[int]], int]:
    """The indices of each split's rows, in their order, and how many rows were moved to fill a split.

    A row's place is its hash u in [0, 1): test below `test_share`, valid below `test_share +
    valid_share`, train from there on; other rows have no part in it. Where few rows leave a split
    empty, the row whose u is nearest to that split's range is moved there from a split that has more
    than one, so that three rows are enough; only such a row may change its split as rows are added.
    """
    shares = [hash_share(row.identity, data.seed, "split") for row in rows]
    edges = {
        "train": (data.test_share + data.valid_share, 1.0),
        "valid": (data.test_share, data.test_share + data.valid_share),
        "test": (0.0, data.test_share),
    }
    splits: dict[str, list[int]] = {
        name: [index for index, share in enumerate(shares) if low <= share < high]
        for name, (low, high) in edges.items()
    }
    empty = [name for name in splits if not splits[name]] if len(rows) >= len(splits) else []
    for name in empty:
        low, high = edges[name]
        spare = [index for other in splits.values() if len(other) > 1 for index in other]
        moved = min(spare, key=lambda index: max(low - shares[index], shares[index] - high))
        for other in splits.values():
            if moved in other:
                other.remove(moved)
        splits[name] = [moved]
    return splits, len(empty)
