"""Fixtures: a home of its own for every test, a tiny random Llama and its tokenizer, Prefect's harness."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import tasks  # noqa: F401  (BLAS has to be loaded before mlx)
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows
from tasks.train.memory.calibration import note_probe

if TYPE_CHECKING:
    import mlx.nn as nn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
}
"""What a family's tiny model has of its own, beside `TINY_LLAMA`."""


def tiny_network(kind: str = "llama", bits: int | None = None, dtype: str = "float32") -> nn.Module:
    """The same random four-layer network of a family every time, quantised when `bits` are given."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    config = TINY_LLAMA | FAMILIES[kind]
    model_class, arguments = _get_classes(config)
    mx.random.seed(11)
    network = model_class(arguments.from_dict(config))
    if kind == "gemma3":
        network.sanitize({})  # no head among the weights: mlx_lm ties it
    network.set_dtype(getattr(mx, dtype))
    if bits:
        nn.quantize(network, group_size=32, bits=bits)
    network.eval()
    mx.eval(network.parameters())
    return network


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need Prefect's server go to two workers: each that has it starts one, in ten seconds."""
    needing = sorted({item.path for item in items if "prefect_harness" in getattr(item, "fixturenames", ())})
    for item in items:
        group = f"prefect {needing.index(item.path) % 2}" if item.path in needing else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """MLX without its compiler, on a CPU a C++ compiler; with it where a test is marked `compiled`."""
    import mlx.core as mx

    if "compiled" in request.keywords:
        mx.enable_compile()
    else:
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runs folder and a cache that no other test sees."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
    note_probe(1.0)  # this machine's is a test of its own, and takes two seconds
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: making its tables takes a second, a copy of it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(home: Path, migrated: Path) -> Path:
    """The MLflow store of this test's home, empty."""
    return Path(shutil.copyfile(migrated, home / "mlflow.db"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A random four-layer Llama with a byte-level tokenizer and a ChatML template."""
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import save_model

    folder = tmp_path_factory.mktemp("tiny-model")
    mx.random.seed(7)
    network = Model(ModelArgs.from_dict(TINY_LLAMA))
    save_model(folder, network)
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    save_tiny_tokenizer(folder)
    return ModelFolder(folder, "tiny-llama", "tiny-fingerprint", str(folder))


def save_tiny_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: 256 bytes and the ChatML control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*control, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


@pytest.fixture
def token_rows() -> TokenRows:
    """Thirteen random rows of 5 to 40 tokens, the second half of each supervised."""
    random = np.random.default_rng(3)
    rows = []
    for length in random.integers(5, 40, 13):
        tokens = random.integers(3, 300, length).tolist()
        rows.append((tokens, [place >= length // 2 for place in range(length)]))
    return TokenRows.from_rows(rows)


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    """One Prefect server and database for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield
