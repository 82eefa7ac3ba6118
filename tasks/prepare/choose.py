"""Which rows are used, and which split each goes to: functions of content and seed, never of position."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from tasks.config import DataSettings
from tasks.prepare.near_duplicates import NearDuplicates
from tasks.prepare.rows import SPLITS, Row, Stream, Unused, hash_share

TRAIN, VALID, TEST = range(len(SPLITS))


def within_characters(stream: Stream, min_chars: int, max_chars: int | None) -> Stream:
    """Leave out rows of fewer or more characters, those of all turns together."""
    for item in stream:
        if isinstance(item, Row):
            count = len(item.text) + sum(len(turn["content"]) for turn in item.messages)
            if count < min_chars:
                item = Unused.of(item, "characters", f"{count} characters; data.min_chars is {min_chars}")
            elif max_chars is not None and count > max_chars:
                item = Unused.of(item, "characters", f"{count} characters; data.max_chars is {max_chars}")
        yield item


def distinct(stream: Stream, near_duplicates: float | None = None) -> Stream:
    """Keep the first of the rows that differ in white space at most, or are nearly the same.

    A source gives held-out rows before training rows, so a row that is in both is taken from training.
    """
    first: dict[bytes, tuple[str, int, str | None]] = {}
    near = NearDuplicates(near_duplicates) if near_duplicates else None
    for item in stream:
        if isinstance(item, Row):
            here = (item.file, item.line, item.split)
            kept = first.setdefault(bytes.fromhex(item.identity)[:16], here)
            kind = "leaked" if kept[2] != item.split else "duplicate"
            if kept is here and near is not None and (found := near.find_or_add(item, here)):
                kept, kind = found, "near_duplicate"
            if kept is not here:
                place = f"line {kept[1]}" + (f" of {kept[0]}" if kept[0] != item.file else "")
                how = "nearly the same as" if kind == "near_duplicate" else "the same as"
                item = Unused.of(item, kind, f"{how} {place}")
        yield item


def smallest_hashes(stream: Stream, count: int, seed: int) -> set[str]:
    """The identities of the `count` rows of smallest hash: raising it adds rows to those chosen before."""
    rows = ((hash_share(i.identity, seed, "choose"), i.identity) for i in stream if isinstance(i, Row))
    return {identity for _, identity in heapq.nsmallest(count, rows)}


def only(stream: Stream, chosen: Collection[str], why: str) -> Stream:
    """Leave out the rows that are not chosen."""
    for item in stream:
        if isinstance(item, Row) and item.identity not in chosen:
            item = Unused.of(item, "not_chosen", why)
        yield item


def assign_splits(
    shares: NDArray[np.float64], given: NDArray[np.int8], data: DataSettings
) -> tuple[NDArray[np.int8], int]:
    """Each row's split as an index into `SPLITS`, and how many rows were moved to fill an empty split.

    A row's place is its hash u in [0, 1): test below `test_share`, valid below `test_share +
    valid_share`, train from there on; other rows have no part in it. Splits that the source gives are
    kept; one that it lacks is taken from its training rows. Where few rows leave a split empty, the
    row whose u is nearest to that split's range is moved there from another that is not given and has
    more than one, so that three rows are enough; only such a row may change its split as rows are added.

    Args:
        shares: (rows,) of `hash_share`.
        given: (rows,) indices into `SPLITS`, or -1.
    """
    edges = {TEST: (0.0, data.test_share), VALID: (data.test_share, data.test_share + data.valid_share)}
    free = np.isin(given, (-1, TRAIN))
    splits = np.where(free, np.int8(TRAIN), given)
    lacking = [split for split in edges if not (given == split).any()]
    for split in lacking:
        low, high = edges[split]
        splits[free & (shares >= low) & (shares < high)] = split
    moved = 0
    for split in (TRAIN, *sorted(lacking)):
        if len(splits) < len(SPLITS) or (splits == split).any():
            continue
        sizes = np.bincount(splits, minlength=len(SPLITS))
        low, high = edges.get(split, (data.test_share + data.valid_share, 1.0))
        spare = np.flatnonzero(free & (sizes[splits] > 1))
        if len(spare):
            distance = np.maximum(low - shares[spare], shares[spare] - high)
            splits[spare[np.argmin(distance)]] = split
            moved += 1
    return splits, moved


def split_by(given: Iterable[int]) -> str:
    """How the splits came about, for reports."""
    found = {SPLITS[split] for split in given if split >= 0}
    lacking = [name for name in SPLITS if name not in found]
    if not found or not lacking:
        return "given" if found else "hash"
    return f"given; {' and '.join(lacking)} by hash"
