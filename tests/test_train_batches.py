"""Batches hold every row once an epoch, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.prepare.splits import TokenRows
from tasks.train.batches import collate, epoch_batches, sorted_batches, steps_per_epoch


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


def test_batches_of_neighbouring_lengths_waste_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 1000)
    padded = sum(len(b) * int(lengths[b].max()) for b in epoch_batches(lengths, 4, seed=0, epoch=0))
    assert padded < 1.1 * lengths.sum()


def test_collate_shifts_by_one_and_gives_padding_no_weight() -> None:
    rows = TokenRows.from_rows([([5, 6, 7], [False, False, True]), ([8, 9], [False, True])])
    batch = collate(rows, np.array([0, 1]))
    assert batch.inputs.tolist() == [[5, 6], [8, 9]]
    assert batch.targets.tolist() == [[6, 7], [9, 0]]
    assert batch.weights.tolist() == [[0, 1], [1, 0]]
    assert batch.supervised_tokens == 2


def test_sorted_batches_cover_all_rows_longest_first(token_rows: TokenRows) -> None:
    batches = list(sorted_batches(token_rows, 4))
    assert sorted(np.concatenate([b.rows for b in batches]).tolist()) == list(range(13))
    assert batches[0].inputs.shape[1] == token_rows.lengths.max() - 1
    assert steps_per_epoch(token_rows, 4) == len(batches) == 4
