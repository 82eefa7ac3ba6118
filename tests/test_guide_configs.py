"""The configs of published guides set what the guides say, and train as many numbers as their heads say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tasks.config import changed, flatten, load_settings
from tasks.train.trainable import count_trainable

CONFIGS = Path(__file__).parent.parent / "flows" / "configs"

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

GUIDES: dict[str, dict[str, Any]] = {
    "guide-tinyllama": {
        "train.num_layers": 16,
        "train.targets": ["q_proj", "v_proj"],
        "train.rank": 8,
        "train.scale": 20.0,
        "train.batch_size": 1,
        "train.max_steps": 50,
        "train.learning_rate": 1e-4,
        "train.grad_checkpoint": True,
    },
    "guide-3b-one-layer": {
        "model.quantize.bits": 4,
        "train.num_layers": 1,
        "train.batch_size": 4,
        "train.max_steps": 222,
        "train.learning_rate": 2e-4,
    },
    "guide-8b": {
        "train.num_layers": -1,
        "train.targets": SEVEN,
        "train.rank": 16,
        "train.alpha": 32.0,
        "train.dropout": 0.1,
        "train.warmup_steps": 100,
        "train.schedule": "cosine",
        "train.max_grad_norm": 1.0,
        "train.accumulation_steps": 3,
    },
}


@pytest.mark.parametrize("guide", list(GUIDES))
def test_a_guides_config_sets_what_it_says(guide: str) -> None:
    settings = load_settings(CONFIGS / f"{guide}.yaml")
    assert GUIDES[guide].items() <= flatten(settings).items()
    assert settings.name == guide
    assert set(changed(settings)) - set(GUIDES[guide]) <= {
        "name",
        "model.quantize.group_size",
        "data.max_rows",
        "data.valid_share",
        "data.test_share",
        "train.schedule",
        "train.warmup_steps",
        "train.batch_size",
        "train.max_steps",
        "train.steps_per_eval",
    }


@pytest.mark.parametrize("guide", list(GUIDES))
def test_the_head_names_the_parameters_trained_on_the_bundled_model(guide: str) -> None:
    said = re.search(r"([\d.]+)M trainable parameters\.\n", (CONFIGS / f"{guide}.yaml").read_text())
    assert said
    counted = count_trainable(SMOLLM2_135M, load_settings(CONFIGS / f"{guide}.yaml").train) / 1e6
    assert counted == pytest.approx(float(said[1]), rel=1e-2)
