"""llama.cpp computes with an export what MLX computes with the adapter, on the real model.

TUNESMITH_LLAMA_CPP_PYTHON names the interpreter of an environment with llama-cpp-python. Takes five
minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import Adam
from mlx_lm.generate import generate_step

from tasks.config import DataSettings, FuseSettings, ModelSettings, TrainSettings
from tasks.fuse.fidelity import observe, proof_rows
from tasks.fuse.gguf_export import ODD_TEXTS, export_gguf, export_gguf_lora
from tasks.fuse.gguf_weights import Kind
from tasks.fuse.merge import fuse_adapter, read_behaviour
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.prepare.splits import TokenRows, load_splits
from tasks.prepare.tokenise import load_tokenizer
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter
from tasks.train.batches import sorted_batches
from tasks.train.loss import batch_loss, mean_loss

PYTHON = os.environ.get("TUNESMITH_LLAMA_CPP_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(
        PYTHON is None, reason="TUNESMITH_LLAMA_CPP_PYTHON names no interpreter with llama-cpp-python"
    ),
]

STRINGS = [
    *json.loads((Path(__file__).parent / "data/models/gguf_references.json").read_text())["texts"],
    *ODD_TEXTS,
]
ROWS, PROMPTS, TOKENS, STEPS = 20, 20, 16, 8


@dataclass(frozen=True)
class Tuned:
    """An adapter trained for a few steps, and what MLX makes of it in float32."""

    model: ModelFolder
    data: StepOutput
    adapter: StepOutput
    fused: StepOutput
    rows: list[tuple[list[int], int]]
    perplexity: float
    greedy: list[list[int]]

    def questions(self) -> dict[str, Any]:
        prompts = [ids[:first] for ids, first in self.rows[:PROMPTS]]
        return {"texts": STRINGS, "rows": self.rows, "prompts": prompts, "tokens": TOKENS}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("TUNESMITH_HOME", str(home))
        patch.setenv("TUNESMITH_CACHE", str(home / "cache"))
        model = resolve_model(ModelSettings())
        data = prepare_data(DataSettings(max_rows=400, max_seq_length=112), model)
        adapter = trained(home / "adapter", model, load_splits(data.path)["train"])
        fused = fuse_adapter(FuseSettings(), model, adapter, data)
        network = load_model(model.path).model
        load_adapter(network, adapter.path)
        rows = [measured(*load_splits(data.path)["test"].row(index)) for index in range(ROWS)]
        masked = [(ids, [at >= first for at in range(len(ids))]) for ids, first in rows]
        perplexity = float(np.exp(mean_loss(network, TokenRows.from_rows(masked), 4, "perplexity")))
        greedy = [
            [int(token) for token, _ in generate_step(mx.array(ids[:first]), network, max_tokens=TOKENS)]
            for ids, first in rows[:PROMPTS]
        ]
        yield Tuned(model, data, adapter, fused, rows, perplexity, greedy)


def measured(ids: np.ndarray, supervised: np.ndarray) -> tuple[list[int], int]:
    return ids.tolist(), int(supervised.argmax())


def trained(folder: Path, model: ModelFolder, rows: TokenRows) -> StepOutput:
    settings = TrainSettings(num_layers=-1, rank=8)
    network = load_model(model.path).model
    add_adapter(network, adapter_config(settings, len(network.layers)), 0)
    optimizer, step = Adam(1e-3), nn.value_and_grad(network, batch_loss)
    for batch in sorted_batches(rows.first(4 * STEPS), 4):
        optimizer.update(network, step(network, batch)[1])
        mx.eval(network.parameters())
    folder.mkdir()
    save_adapter(folder, adapter_weights(network), adapter_config(settings, len(network.layers)))
    return StepOutput(folder, "trained", False, 0.0)


def llama_cpp(gguf: Path, questions: dict[str, Any], *adapter: Path) -> dict[str, Any]:
    asked = gguf.parent / "questions.json"
    asked.write_text(json.dumps(questions))
    script = Path(__file__).parent / "llama_cpp_reference.py"
    command = [str(PYTHON), str(script), str(gguf), str(asked), *map(str, adapter)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    answer: dict[str, Any] = json.loads(told.stdout)
    return answer


def perplexity(answer: dict[str, Any]) -> float:
    return float(np.exp(np.mean([loss for row in answer["losses"] for loss in row])))


def equal_answers(tuned: Tuned, answer: dict[str, Any]) -> int:
    return sum(ours == theirs for ours, theirs in zip(tuned.greedy, answer["greedy"], strict=True))


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 0.005), ("f16", 0.005), ("bf16", 0.02), ("q8_0", 0.02)]
)
def test_llama_cpp_has_the_tokens_the_perplexity_and_the_answers_of_the_adapter(
    tuned: Tuned, tmp_path: Path, kind: Kind, tolerance: float
) -> None:
    expected = read_behaviour(tuned.fused.path)
    rows = proof_rows(tuned.data.path, tuned.model.path)
    exported = export_gguf(tmp_path / "out", tuned.fused.path, "tuned", kind, rows, expected)
    answer = llama_cpp(exported.file, tuned.questions())
    tokenizer = load_tokenizer(tuned.fused.path)
    assert len(STRINGS) >= 200
    assert answer["texts"] == [tokenizer.encode(text) for text in STRINGS]
    assert answer["framed"] == tokenizer.encode("a")
    assert answer["metadata"]["tokenizer.chat_template"][:100] == tokenizer.chat_template[:100]
    print(f"{kind}: perplexity {perplexity(answer):.5f}, MLX {tuned.perplexity:.5f}; ", end="")
    print(f"{equal_answers(tuned, answer)} of {PROMPTS} answers equal")
    assert perplexity(answer) == pytest.approx(tuned.perplexity, rel=tolerance)
    if kind == "f32":
        assert equal_answers(tuned, answer) >= 16


def test_llama_cpp_has_the_same_of_the_base_with_the_adapter_given_by_lora(
    tuned: Tuned, tmp_path: Path
) -> None:
    rows = proof_rows(tuned.data.path, tuned.model.path)
    behaviour = observe(load_model(tuned.model.path).model, rows)
    base = export_gguf(tmp_path / "base", tuned.model.path, "base", "f32", rows, behaviour)
    lora = export_gguf_lora(tmp_path / "lora", tuned.model, tuned.adapter.path, "tuned", None, None)
    alone = llama_cpp(base.file, tuned.questions())
    answer = llama_cpp(base.file, tuned.questions(), lora.file)
    print(f"lora: perplexity {perplexity(answer):.5f}, MLX {tuned.perplexity:.5f}; ", end="")
    print(f"{equal_answers(tuned, answer)} of {PROMPTS} answers equal; ", end="")
    print(f"the base: {perplexity(alone):.5f}, {equal_answers(tuned, alone)}")
    assert perplexity(answer) == pytest.approx(tuned.perplexity, rel=0.005)
    assert perplexity(alone) > tuned.perplexity * 1.05
    assert equal_answers(tuned, answer) >= 16 > equal_answers(tuned, alone)
