"""What fusing and answering are predicted to take is what they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_LLAMA, save_tiny_tokenizer

from tasks.config import EvaluateSettings, FuseSettings, ModelSettings, Settings, TrainSettings
from tasks.evaluate.generation import answer_prompts
from tasks.fuse.merge import fuse_adapter
from tasks.models.device import on_gpu
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter
from tasks.train.memory.afterwards import ANSWERING, FUSING, estimate_afterwards
from tasks.train.memory.backends import CPU
from tasks.train.memory.calibration import Calibration
from tasks.train.memory.replay import highest
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.traced_afterwards import loading_graph
from tasks.train.memory.traced_step import flat
from tasks.train.outline import outline

SMALL = {
    **TINY_LLAMA,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 4000,
    "max_position_embeddings": 4096,
}
TRAIN = TrainSettings(num_layers=-1, rank=8)


@pytest.fixture
def small_model(tmp_path: Path) -> ModelFolder:
    """Large enough for weights, caches and activations to be told from odds and ends: 13 MB."""
    from mlx_lm.utils import save_model

    folder = tmp_path / "small-model"
    folder.mkdir()
    mx.random.seed(7)
    save_model(folder, outline(SMALL))
    (folder / "config.json").write_text(json.dumps(SMALL))
    save_tiny_tokenizer(folder)
    return ModelFolder(folder, "small-llama", "small-fingerprint", str(folder))


def rows_of(length: int) -> TokenRows:
    """Eight random rows, half of each supervised."""
    random = np.random.default_rng(3)
    supervised = [place >= length - length // 2 for place in range(length)]
    return TokenRows.from_rows([(random.integers(3, 300, length).tolist(), supervised) for _ in range(8)])


def adapter_of(folder: Path, model: ModelFolder) -> StepOutput:
    network = outline(model.config())
    config = adapter_config(TRAIN, len(network.layers))
    add_adapter(network, config, 0)
    folder.mkdir()
    save_adapter(folder, adapter_weights(network), config)
    return StepOutput(folder, "adapter", False, 0.0)


def measured(work: Callable[[], object]) -> int:
    """Peak bytes of some work, without what other tests left behind."""
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return int(mx.get_peak_memory()) - held


def fusing_peak(folder: Path, model: ModelFolder, length: int) -> int:
    data = folder / "data"
    data.mkdir()
    save_splits(data, dict.fromkeys(("train", "valid", "test"), rows_of(length)))
    adapter, prepared = adapter_of(folder / "adapter", model), StepOutput(data, "data", False, 0.0)
    return measured(lambda: fuse_adapter(FuseSettings(), model, adapter, prepared))


def answering_peak(folder: Path, model: ModelFolder, length: int, settings: EvaluateSettings) -> int:
    adapter = adapter_of(folder / "adapter", model)
    tokens, prompt = rows_of(length), length - length // 2
    prompts = [tokens.row(place)[0][:prompt].tolist() for place in range(settings.samples)]

    def answer() -> None:
        loaded = load_model(model.path)
        load_adapter(loaded.model, adapter.path)
        loaded.tokenizer.eos_token_ids = set()  # every answer is as long as it may be
        answer_prompts(loaded, prompts, settings, "answers")

    return measured(answer)


def predicted(model: ModelFolder, length: int, evaluate: EvaluateSettings | None = None) -> dict[str, int]:
    settings = Settings(train=TRAIN, evaluate=evaluate or EvaluateSettings())
    rows = RowSizes.alike(length, length // 2)
    found = estimate_afterwards(settings, model.config(), rows, Calibration())
    assert all(parts.weights > 0 for parts in found.values())
    return {name: parts.bytes for name, parts in found.items()}


@pytest.mark.skipif(on_gpu(), reason="the pace is that of the CPU backend")
@pytest.mark.compiled
@pytest.mark.parametrize("length", [16, 200])
def test_fusing_takes_what_is_predicted(tmp_path: Path, small_model: ModelFolder, length: int) -> None:
    took = fusing_peak(tmp_path, small_model, length)
    assert predicted(small_model, length)[FUSING] == pytest.approx(took, rel=0.1)


@pytest.mark.skipif(on_gpu(), reason="the pace is that of the CPU backend")
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("length", "batch_size", "max_tokens"),
    [(200, 8, 8), (200, 4, 8), (500, 4, 20), (1000, 8, 30)],
    ids=["one batch", "two batches", "caches grow", "long prompts"],
)
def test_answering_takes_what_is_predicted(
    tmp_path: Path, small_model: ModelFolder, length: int, batch_size: int, max_tokens: int
) -> None:
    settings = EvaluateSettings(samples=8, batch_size=batch_size, max_tokens=max_tokens)
    took = answering_peak(tmp_path, small_model, length, settings)
    assert predicted(small_model, length, settings)[ANSWERING] == pytest.approx(took, rel=0.1)


def test_only_what_is_done_is_predicted(small_model: ModelFolder) -> None:
    rows, config = RowSizes.alike(32, 16), small_model.config()
    settings = Settings(train=TRAIN)
    none = settings.model_copy(
        update={
            "evaluate": EvaluateSettings(samples=0),
            "fuse": FuseSettings(enabled=False),
        }
    )
    assert list(estimate_afterwards(settings, config, rows)) == [ANSWERING, FUSING]
    assert estimate_afterwards(none, config, rows) == {}
    prompted = settings.model_copy(update={"train": TrainSettings(method="soft-prompt")})
    assert list(estimate_afterwards(prompted, config, rows)) == [ANSWERING]


def test_a_cache_of_more_answers_and_more_tokens_is_larger(small_model: ModelFolder) -> None:
    few = EvaluateSettings(samples=8, batch_size=4, max_tokens=16)
    peaks = [
        predicted(small_model, 64, few.model_copy(update=changes))[ANSWERING]
        for changes in ({}, {"batch_size": 8}, {"batch_size": 8, "max_tokens": 600})
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_weights_stored_in_fewer_bytes_are_beside_their_float32_form_while_they_are_loaded() -> None:
    loading = [highest_bytes({**SMALL, "dtype": dtype}) for dtype in ("float32", "bfloat16")]
    weights = sum(array.nbytes for _, array in flat(outline(SMALL).parameters()))
    assert loading[0] == weights < loading[1] < 1.5 * weights


def highest_bytes(config: dict[str, object]) -> int:
    return highest(loading_graph(config), CPU, lambda value: "all", []).bytes


@pytest.mark.real
@pytest.mark.compiled
@pytest.mark.skipif(on_gpu(), reason="the pace is that of the CPU backend")
def test_the_bundled_model_takes_what_is_predicted(tmp_path: Path) -> None:
    model, settings = resolve_model(ModelSettings()), EvaluateSettings(max_tokens=16)
    peaks = predicted(model, 128, settings)
    (tmp_path / "one").mkdir()
    assert peaks[FUSING] == pytest.approx(fusing_peak(tmp_path / "one", model, 128), rel=0.05)
    (tmp_path / "two").mkdir()
    assert peaks[ANSWERING] == pytest.approx(answering_peak(tmp_path / "two", model, 128, settings), rel=0.05)
