"""The bundled model, imported, is the one llama.cpp and transformers read from the same file.

The references are made by benchmarks/make_gguf_references.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tasks.config import ModelSettings
from tasks.models.bundled import bundled_gguf
from tasks.models.folder import ModelFolder
from tasks.models.gguf_check import GgufFile, read_gguf
from tasks.models.gguf_import import import_gguf
from tasks.models.gguf_tokenizer import build_tokenizer
from tasks.models.load import LoadedModel, load_model
from tasks.models.resolve import resolve_model

pytestmark = pytest.mark.real

REFERENCES = json.loads((Path(__file__).parent / "data/models/gguf_references.json").read_text())


@pytest.fixture(scope="module")
def file() -> GgufFile:
    return read_gguf(bundled_gguf())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_model(ModelSettings())


@pytest.fixture(scope="module")
def loaded(folder: ModelFolder) -> LoadedModel:
    return load_model(folder.path)


def reference_weights(file: GgufFile) -> dict[str, np.ndarray[Any, Any]]:
    """The gguf package's dequantised tensors, q and k rows in Hugging Face's order."""
    heads = {"attn_q": 9, "attn_k": 3}
    weights = {}
    for name, tensor in file.tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if count := heads.get(name.split(".")[-2], 0):
            # As transformers undoes it: (head, half, pair, ...) to (head, pair, half, ...).
            pairs = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:])
            values = pairs.swapaxes(2, 1).reshape(values.shape)
        weights[name] = values
    return weights


def test_every_weight_is_the_gguf_packages_own(file: GgufFile, loaded: LoadedModel) -> None:
    from mlx.utils import tree_flatten

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    expected = reference_weights(file)
    parameters = dict(tree_flatten(loaded.model.parameters()))
    assert len(parameters) == len(expected) == 272
    for name, value in parameters.items():
        source = names.get_name(name, try_suffixes=(".weight",))
        np.testing.assert_array_equal(np.array(value), expected[source], err_msg=name)


def test_kept_quantised_every_weight_is_the_same(
    file: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    folder = import_gguf(bundled_gguf(), "bundled", "stored")
    layers = json.loads((folder / "config.json").read_text())["quantization"]
    assert layers == {
        "group_size": 32,
        "mode": "affine",
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "mode": "affine", "bits": 8},
    }
    attention = load_model(folder).model.model.layers[7].self_attn
    expected = reference_weights(file)
    for part, name in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v")):
        values = np.array(getattr(attention, part).weight)
        np.testing.assert_array_equal(values, expected[f"blk.7.{name}.weight"])


def test_token_ids_are_those_of_llama_cpp_and_decode_to_the_text(loaded: LoadedModel) -> None:
    texts = REFERENCES["texts"]
    assert len(texts) >= 100
    for text, ids in zip(texts, REFERENCES["ids"]["smollm"], strict=True):
        assert loaded.tokenizer.encode(text) == ids, ascii(text)
        assert loaded.tokenizer.decode(ids) == text


@pytest.mark.parametrize("rule", ["gpt-2", "default", "llama-bpe", "qwen2"])
def test_other_splitting_rules_give_llama_cpps_ids_too(file: GgufFile, rule: str) -> None:
    changes = {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": False}
    tokenizer = build_tokenizer(dataclasses.replace(file, metadata={**file.metadata, **changes}))
    for text, ids in zip(REFERENCES["texts"], REFERENCES["ids"][rule], strict=True):
        assert tokenizer.encode(text).ids == ids, ascii(text)
    assert REFERENCES["ids"][rule] != REFERENCES["ids"]["smollm"]


@pytest.mark.parametrize("prompt", REFERENCES["prompts"], ids=range(len(REFERENCES["prompts"])))
def test_logits_are_those_of_transformers_in_float32(loaded: LoadedModel, prompt: dict[str, Any]) -> None:
    import mlx.core as mx

    assert loaded.tokenizer.encode(prompt["text"]) == prompt["ids"]
    logits = np.array(loaded.model(mx.array([prompt["ids"]]))[0])  # (length, vocabulary)
    tokens, values = zip(*prompt["top"], strict=True)
    np.testing.assert_allclose(logits[-1, list(tokens)], values, atol=1e-3)
    assert int(logits[-1].argmax()) == tokens[0]
    rows, columns, sampled = zip(*prompt["sampled"], strict=True)
    np.testing.assert_allclose(logits[list(rows), list(columns)], sampled, atol=1e-3)


def test_it_knows_the_capital_of_france(folder: ModelFolder, loaded: LoadedModel) -> None:
    from mlx_lm import generate

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24)
    assert "Paris" in answer
    assert folder.name == "SmolLM2-135M-Instruct"
    assert loaded.tokenizer.eos_token == "<|im_end|>"
