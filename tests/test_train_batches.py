"""Batches hold every row once an epoch, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.prepare.splits import TokenRows
from tasks.train.batches import (
    POOL_BATCHES,
    Group,
    collate,
    epoch_batches,
    sorted_batches,
    update_groups,
    updates_per_epoch,
)


@given(
    lengths=st.lists(st.integers(2, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 5),
)
def test_every_row_is_in_exactly_one_batch_of_an_epoch(
    lengths: list[int], batch_size: int, epoch: int
) -> None:
    batches = epoch_batches(np.array(lengths), batch_size, seed=1, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = np.arange(2, 102)

    def order(seed: int, epoch: int) -> list[list[int]]:
        np.random.seed(np.random.randint(1000))
        return [batch.tolist() for batch in epoch_batches(lengths, 4, seed, epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@given(
    lengths=st.lists(st.integers(2, 2000), min_size=1, max_size=400),
    batch_size=st.integers(1, 9),
)
def test_padding_is_at_most_the_range_of_lengths_for_each_row_of_a_batch_and_pool(
    lengths: list[int], batch_size: int
) -> None:
    of = np.array(lengths)
    padded = sum(len(rows) * int(of[rows].max()) for rows in epoch_batches(of, batch_size, 0, 0))
    pools = -(-len(lengths) // (batch_size * POOL_BATCHES))
    assert padded - of.sum() <= pools * batch_size * (of.max() - of.min())


def test_padding_of_a_large_set_is_as_low_as_is_said() -> None:
    random = np.random.default_rng(0)
    uniform = random.integers(10, 400, 5000)
    skewed = np.clip(random.lognormal(np.log(120), 1, 5000), 8, 2048).astype(np.int64)
    for lengths, limit in ((uniform, 0.025), (skewed, 0.11)):
        padded = sum(len(b) * int(lengths[b].max()) for b in epoch_batches(lengths, 4, seed=0, epoch=0))
        assert padded < (1 + limit) * lengths.sum()


def test_membership_of_batches_is_new_every_epoch() -> None:
    lengths = np.full(64, 9)
    first, second = ({frozenset(b.tolist()) for b in epoch_batches(lengths, 4, 0, e)} for e in (0, 1))
    assert len(first & second) <= 1


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3, 5])
def test_groups_hold_every_row_once_an_epoch_the_partial_one_included(
    token_rows: TokenRows, accumulation_steps: int
) -> None:
    updates = updates_per_epoch(token_rows, 2, accumulation_steps)  # 13 rows: 7 batches
    assert updates == -(-7 // accumulation_steps)
    groups = list(islice(update_groups(token_rows, 2, accumulation_steps, seed=0), 2 * updates))
    for epoch in (groups[:updates], groups[updates:]):
        rows = [row for group in epoch for batch in group.batches for row in batch.rows.tolist()]
        assert sorted(rows) == list(range(13))
    assert [(groups[at].epoch, groups[at].position) for at in (updates - 1, -1)] == [(1, 0), (2, 0)]


def test_groups_go_on_from_any_place_as_if_never_stopped(token_rows: TokenRows) -> None:
    straight = [rows_of(group) for group in islice(update_groups(token_rows, 2, 3, seed=4), 8)]
    for stop in range(8):
        groups = list(islice(update_groups(token_rows, 2, 3, seed=4), stop))
        place = (groups[-1].epoch, groups[-1].position) if groups else (0, 0)
        rest = islice(update_groups(token_rows, 2, 3, 4, *place), 8 - stop)
        assert [rows_of(group) for group in [*groups, *rest]] == straight


def rows_of(group: Group) -> list[list[int]]:
    return [batch.rows.tolist() for batch in group.batches]


def test_rows_that_teach_nothing_take_no_part() -> None:
    silent = ([5, 6, 7], [False, False, False])
    rows = TokenRows.from_rows([silent, ([8, 9], [False, True]), silent, ([5, 6], [False, True])])
    assert updates_per_epoch(rows, 1, 1) == 2
    [first, second] = islice(update_groups(rows, 1, 1, seed=0), 2)
    assert sorted(rows_of(first) + rows_of(second)) == [[1], [3]]


def test_collate_shifts_by_one_and_never_supervises_padding() -> None:
    rows = TokenRows.from_rows([([5, 6, 7], [False, False, True]), ([8, 9], [False, True])])
    batch = collate(rows, np.array([0, 1]))
    assert batch.inputs.tolist() == [[5, 6], [8, 9]]
    assert batch.positions.tolist() == [1, 2]
    assert batch.targets.tolist() == [7, 9]
    assert batch.supervised_tokens == 2


def test_sorted_batches_cover_all_rows_longest_first(token_rows: TokenRows) -> None:
    batches = list(sorted_batches(token_rows, 4))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(13))
    assert batches[0].inputs.shape[1] == token_rows.lengths.max() - 1
    assert len(batches) == 4
