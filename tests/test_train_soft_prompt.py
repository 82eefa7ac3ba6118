"""A soft prompt: ids beyond the vocabulary in front of every row, everywhere the same."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import FAMILIES, tiny_network
from mlx.utils import tree_flatten

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter
from tasks.train.batches import collate
from tasks.train.loss import batch_loss, mean_loss
from tasks.train.soft_prompt import PromptedEmbedding, prefix_ids, with_prefix

SETTINGS = TrainSettings(method="soft-prompt", prompt_tokens=3)
CONFIG = adapter_config(SETTINGS, 4)


def prompted(kind: str = "llama", bits: int | None = None, seed: int = 0) -> nn.Module:
    network = tiny_network(kind, bits)
    add_adapter(network, CONFIG, seed)
    return network


def prompt_of(network: nn.Module) -> mx.array:
    (array,) = adapter_weights(network).values()
    return array


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_the_vectors_stand_where_input_embeddings_would(kind: str, bits: int | None) -> None:
    """Against mlx-lm's own way in for vectors, `input_embeddings`."""
    network, plain = prompted(kind, bits), tiny_network(kind, bits)
    tokens = mx.array([[7, 8, 9], [9, 8, 7]])
    ids = mx.broadcast_to(mx.array(prefix_ids(network)), (2, 3))
    known = plain.model.embed_tokens(tokens)
    vectors = mx.concatenate([mx.broadcast_to(prompt_of(network), (2, 3, 32)), known], axis=1)
    expected = plain(mx.concatenate([tokens, tokens], axis=1), input_embeddings=vectors)
    found = network(mx.concatenate([ids, tokens], axis=1))
    assert found.shape == (2, 6, 320)  # no logits of prompt ids
    assert np.allclose(np.array(found), np.array(expected), atol=1e-5)
    assert np.array_equal(np.array(network(tokens)), np.array(plain(tokens)))


def test_it_begins_as_embeddings_of_tokens_drawn_from_the_seed() -> None:
    table = np.array(tiny_network().model.embed_tokens.weight)
    for vector in np.array(prompt_of(prompted())):
        assert (np.abs(table - vector).sum(axis=1) == 0).any()
    half = tiny_network(dtype="bfloat16")
    add_adapter(half, CONFIG, 0)
    assert prompt_of(half).dtype == mx.float32
    assert half(mx.array([prefix_ids(half)])).dtype == mx.bfloat16
    assert mx.array_equal(prompt_of(prompted()), prompt_of(prompted()))
    assert not mx.array_equal(prompt_of(prompted()), prompt_of(prompted(seed=1)))


def test_ids_follow_the_vocabulary_and_are_none_without_a_prompt() -> None:
    assert prefix_ids(prompted()) == [320, 321, 322]
    assert prefix_ids(tiny_network()) == []


def test_a_prefix_teaches_the_same_tokens_and_no_more(token_rows: TokenRows) -> None:
    longer = with_prefix(token_rows, [320, 321])
    assert len(longer) == len(token_rows)
    for index in range(len(longer)):
        (tokens, mask), (plain, plain_mask) = longer.row(index), token_rows.row(index)
        assert tokens.tolist() == [320, 321, *plain.tolist()]
        assert mask.tolist() == [False, False, *plain_mask.tolist()]
    assert (longer.tokens.dtype, longer.offsets.dtype, longer.supervised.dtype) == (
        np.int32,
        np.int64,
        np.bool_,
    )
    assert with_prefix(token_rows, []) is token_rows


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_only_the_prompt_is_trained_and_it_lowers_the_loss(kind: str, token_rows: TokenRows) -> None:
    network = prompted(kind)
    frozen = {name: np.array(a) for name, a in tree_flatten(network.parameters()) if "prompt" not in name}
    rows = with_prefix(token_rows, prefix_ids(network))
    batch = collate(rows, np.arange(len(rows)))
    before = mean_loss(network, rows, 4, "")
    optimizer = optim.Adam(0.05)
    for _ in range(20):
        _, gradient = nn.value_and_grad(network, lambda: batch_loss(network, batch))()
        optimizer.update(network, gradient)
    assert mean_loss(network, rows, 4, "") < 0.98 * before
    for name, array in tree_flatten(network.parameters()):
        if name in frozen:
            assert np.array_equal(frozen[name], np.array(array)), name


def test_a_saved_prompt_is_loaded_to_the_bit(tmp_path: Path) -> None:
    network = prompted()
    save_adapter(tmp_path, adapter_weights(network), CONFIG)
    again = tiny_network()
    load_adapter(again, tmp_path)
    assert mx.array_equal(prompt_of(network), prompt_of(again))
    assert prefix_ids(again) == [320, 321, 322]


def test_mlx_lm_does_not_take_a_soft_prompt_for_something_else(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    save_adapter(tmp_path, adapter_weights(prompted()), CONFIG)
    with pytest.raises(AttributeError):
        load_adapters(tiny_network(), str(tmp_path))


def test_a_model_with_two_embeddings_is_refused() -> None:
    network = tiny_network()
    network.model.per_layer = nn.Embedding(320, 8)
    with pytest.raises(InputError, match=r"this one has 2 \(model.embed_tokens, model.per_layer\); use lora"):
        add_adapter(network, CONFIG, 0)


def test_a_head_that_multiplies_with_the_embeddings_finds_them() -> None:
    embedding = nn.Embedding(10, 4)
    assert PromptedEmbedding(embedding, 2).weight is embedding.weight


def test_evaluation_and_generation_put_the_prompt_in_front(
    tmp_path: Path, tiny_model: ModelFolder, token_rows: TokenRows
) -> None:
    """Generated token by token with a cache, and without one from the whole row."""
    from tasks.config import EvaluateSettings
    from tasks.evaluate.generation import answer_prompts
    from tasks.evaluate.measure import measure

    loaded = load_model(tiny_model.path)
    add_adapter(loaded.model, CONFIG, 0)
    loaded.model.model.embed_tokens.prompt = mx.random.normal((3, 32), key=mx.random.key(2))
    save_adapter(tmp_path, adapter_weights(loaded.model), CONFIG)
    save_splits(tmp_path, dict.fromkeys(("train", "valid", "test"), token_rows))

    loaded.model.eval()
    prompt = [5, 6, 7]
    expected: list[int] = []
    for _ in range(4):
        ids = mx.array([[*prefix_ids(loaded.model), *prompt, *expected]])
        expected.append(int(mx.argmax(loaded.model(ids)[0, -1])))
    settings = EvaluateSettings(samples=0, max_tokens=4, general_rows=0)
    [answer] = answer_prompts(loaded, [prompt], settings, "").answers
    assert answer.ids == expected

    output = StepOutput(tmp_path, "a", False, 0.0)
    measured = measure(settings, tiny_model, output, output).read_json("evaluation.json")["test_loss"]
    rows = with_prefix(token_rows, prefix_ids(loaded.model))
    assert measured == pytest.approx(mean_loss(loaded.model, rows, 8, ""), rel=1e-6)
    assert measured != pytest.approx(mean_loss(loaded.model, token_rows, 8, ""), rel=1e-4)
