"""Losses row by row are the losses of training and of mlx-lm, once its tail and its padding are put right."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_network
from mlx_lm.tuner.trainer import evaluate

from tasks.evaluate.losses import measure_losses, perplexity
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import add_adapter
from tasks.train.loss import mean_loss, row_losses
from tasks.train.soft_prompt import prefix_ids, with_prefix
from tasks.train.supervised import log_probabilities


@pytest.mark.parametrize("batch_size", [1, 4, 13])
def test_the_rows_sum_up_to_the_mean_loss_of_training(token_rows: TokenRows, batch_size: int) -> None:
    network = tiny_network()
    found = row_losses(network, token_rows, batch_size, "")
    mean = mean_loss(network, token_rows, batch_size, "")
    assert found.nll.sum() / found.tokens.sum() == pytest.approx(mean, rel=1e-6)
    assert found.tokens.tolist() == token_rows.supervised_counts.tolist()


def test_each_row_has_its_own_sum_and_its_own_hits(token_rows: TokenRows) -> None:
    network = tiny_network()
    found = row_losses(network, token_rows, 4, "")
    for index in range(len(token_rows)):
        tokens, supervised = token_rows.row(index)
        plain = np.array(log_probabilities(network(mx.array(tokens[None]))))[0, :-1]
        targets, learnt = tokens[1:], supervised[1:]
        nll = -plain[np.arange(len(targets)), targets][learnt]
        assert found.nll[index] == pytest.approx(nll.sum(), rel=1e-4)
        assert found.correct[index] == (plain.argmax(axis=-1) == targets)[learnt].sum()


def test_a_row_without_a_supervised_token_has_zeros() -> None:
    rows = TokenRows.from_rows([([5, 6, 7], [False] * 3), ([5, 6, 8], [False, True, True])])
    found = row_losses(tiny_network(), rows, 2, "")
    assert (found.nll[0], found.tokens[0]) == (0, 0)
    assert found.tokens[1] == 2
    figures = measure_losses(tiny_network(), rows.first(1), 2, "")
    assert np.isnan(figures["loss"])


def test_figures_are_those_of_the_rows(token_rows: TokenRows) -> None:
    network = tiny_network()
    figures = measure_losses(network, token_rows, 4, "")
    rows = figures["rows"]
    tokens = sum(row["tokens"] for row in rows)
    assert figures["loss"] == pytest.approx(sum(row["nll"] for row in rows) / tokens)
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    assert figures["token_accuracy"] == sum(row["correct"] for row in rows) / tokens
    assert perplexity(1000.0) == np.inf


def test_a_soft_prompt_stands_in_front_of_the_rows(token_rows: TokenRows) -> None:
    network = tiny_network()
    add_adapter(network, {"fine_tune_type": "soft-prompt", "prompt_tokens": 3}, 0)
    in_front = with_prefix(token_rows, prefix_ids(network))
    expected = mean_loss(network, in_front, 4, "")
    assert measure_losses(network, token_rows, 4, "")["loss"] == pytest.approx(expected, rel=1e-6)
    assert measure_losses(network, token_rows, 4, "")["loss"] != pytest.approx(
        mean_loss(network, token_rows, 4, ""), rel=1e-5
    )


def test_the_loss_is_mlx_lms_own_but_for_its_dropped_rows_and_its_supervised_padding(
    token_rows: TokenRows,
) -> None:
    """mlx-lm 0.32.2 leaves out the longest rows, and counts a padding token (id 0) after each shorter row."""
    network = tiny_network()
    batch_size = 4
    spans = [token_rows.row(index) for index in range(len(token_rows))]
    dataset = [(tokens.tolist(), int(np.argmax(supervised))) for tokens, supervised in spans]
    theirs = evaluate(network, dataset, batch_size, num_batches=-1)

    order = sorted(range(len(spans)), key=lambda index: len(spans[index][0]))
    kept = order[: len(order) // batch_size * batch_size]
    assert len(kept) < len(order)
    as_theirs = [([*spans[index][0].tolist(), 0], [*spans[index][1].tolist(), True]) for index in kept]
    ours = measure_losses(network, TokenRows.from_rows(as_theirs), batch_size, "")["loss"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != pytest.approx(measure_losses(network, token_rows, batch_size, "")["loss"], rel=1e-4)
