"""Logits gathered before the head equal those of the plain forward pass, or are not used."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tasks.train import supervised
from tasks.train.supervised import supervised_logits

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "llama", "tie_word_embeddings": False},
    {"model_type": "mistral", "tie_word_embeddings": False},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "tie_word_embeddings": True},
    {"model_type": "gemma2", "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
]


@pytest.fixture(autouse=True)
def no_verdicts_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "_verdicts", {})


def network(family: dict[str, Any]) -> nn.Module:
    from mlx_lm.utils import _get_classes

    config = SMALL | family
    model_class, arguments = _get_classes(config)
    mx.random.seed(5)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    return model


INPUTS = mx.array(np.random.default_rng(1).integers(0, 101, (3, 9)).astype(np.int32))
POSITIONS = mx.array([2, 3, 11, 25, 26])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family.values())))
def test_gathered_logits_and_gradients_equal_the_plain_ones(family: dict[str, Any]) -> None:
    model = network(family)
    expected = np.array(model(INPUTS).reshape(-1, 101)[POSITIONS])
    assert np.allclose(np.array(supervised_logits(model, INPUTS, POSITIONS)), expected, atol=1e-5)
    assert supervised._verdicts == {type(model): True}

    def total(gathered: bool) -> dict[str, mx.array]:
        def squares() -> mx.array:
            if gathered:
                logits = supervised_logits(model, INPUTS, POSITIONS)
            else:
                logits = model(INPUTS).reshape(-1, 101)[POSITIONS]
            return mx.square(logits).mean()

        return dict(tree_flatten(nn.value_and_grad(model, squares)()[1]))

    plain, gathered = total(False), total(True)
    for name, gradient in plain.items():
        assert np.allclose(np.array(gradient), np.array(gathered[name]), rtol=1e-3, atol=1e-5), name


def test_the_models_class_and_parameter_names_are_as_before() -> None:
    model = network(FAMILIES[0])
    kind, names = type(model.model), [name for name, _ in tree_flatten(model.parameters())]
    supervised_logits(model, INPUTS, POSITIONS)
    assert type(model.model) is kind
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert model(INPUTS).shape == (3, 9, 101)


class Oddity(nn.Module):
    """A model whose head looks at its neighbours, so that gathering before it would be wrong."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.model = nn.Embedding(101, 8)
        self.head = nn.Linear(8, 101)
        self.odd = odd

    def __call__(self, inputs: mx.array) -> mx.array:
        hidden = self.model(inputs)
        if self.odd == "mixes positions":
            hidden = hidden + hidden.mean(axis=1, keepdims=True)
        if self.odd == "looks at the ids":
            hidden = hidden + mx.cos(inputs[..., None])
        return self.head(hidden)


@pytest.mark.parametrize("odd", ["mixes positions", "looks at the ids"])
def test_a_model_that_cannot_be_gathered_is_computed_plainly_with_a_warning(
    odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Oddity(odd)
    with caplog.at_level(logging.WARNING):
        logits = supervised_logits(model, INPUTS, POSITIONS)
    assert np.allclose(np.array(logits), np.array(model(INPUTS).reshape(-1, 101)[POSITIONS]), atol=1e-6)
    assert "training is slower" in caplog.text
