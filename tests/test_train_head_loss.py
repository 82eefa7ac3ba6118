"""A loss in chunks is that of the whole, with the gradient of the layers and of the head itself."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tiny_network
from mlx.utils import tree_flatten

from tasks.prepare.splits import TokenRows
from tasks.train import head_loss
from tasks.train.batches import bucket, collate
from tasks.train.loss import summed_loss


def losses_and_gradients(network: nn.Module, rows: TokenRows) -> tuple[float, dict[str, mx.array]]:
    batch = collate(rows, np.arange(len(rows)))
    loss, gradient = nn.value_and_grad(network, lambda: summed_loss(network, *batch.arrays()))()
    return loss.item(), dict(tree_flatten(gradient))


@pytest.mark.parametrize("gpus", [False, True], ids=["our cross-entropy", "MLX's, as on a GPU"])
@pytest.mark.parametrize("trained", ["layers", "everything", "nothing in training mode"])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch, trained: str, gpus: bool
) -> None:
    monkeypatch.setattr(head_loss, "on_gpu", lambda: gpus)
    network = tiny_network()
    if trained == "layers":
        network.freeze()
        network.layers[3].unfreeze()
    network.train(trained != "nothing in training mode")
    whole, expected = losses_and_gradients(network, token_rows)
    pieces: list[int] = []
    plain = head_loss.token_losses

    def counted(logits: mx.array, targets: mx.array) -> mx.array:
        pieces.append(len(logits))
        return plain(logits, targets)

    monkeypatch.setattr(head_loss, "chunk_bytes", lambda: 320 * 4 * 20)
    monkeypatch.setattr(head_loss, "token_losses", counted)
    chunked, found = losses_and_gradients(network, token_rows)
    assert len(pieces) > 5
    assert max(pieces) <= 20, "full logits never exist"
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert mx.abs(found[name] - gradient).max() <= 1e-5 * mx.abs(gradient).max() + 1e-7, name


def test_buckets_are_few_and_close() -> None:
    for steps, waste in ((16, 1 / 16), (8, 1 / 8)):
        found = {bucket(count, steps) for count in range(1, 4097)}
        assert len([size for size in found if 1024 < size <= 2048]) == steps
        assert all(count <= bucket(count, steps) <= count * (1 + waste) for count in range(1, 4097))
