"""Two tiny updates, once for a machine, backend and version of MLX: is memory taken here as it is replayed?

They run in a process of its own, where nothing else takes memory. On a CPU measured over replayed is 1.000; a
backend that has not been measured may hold more than its rules say. A ratio under 1 counts for nothing: a GPU
may compute so small a model as fast as it is handed over.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from tasks.config import TrainSettings
from tasks.progress import progress
from tasks.train.memory.calibration import changing_bytes, note_probe, probed

log = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}

SETTINGS = TrainSettings(num_layers=-1, batch_size=2, epochs=2, max_steps=2, frozen_prefix="never")

SECONDS = 120
"""At most: it takes two."""


def calibrate_once() -> None:
    """Measure this machine, unless that has been done; what cannot be measured is told and left alone."""
    if probed():
        return
    command = [sys.executable, "-c", f"from {__name__} import measured_ratio; print(measured_ratio())"]
    with progress("memory of this machine, once"):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            ratio = float(done.stdout.split()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            log.warning(
                "how this machine takes memory could not be measured (%s): predictions are what MLX's rules "
                "give, until three runs have ended",
                _reason(error),
            )
            ratio = 1.0
    note_probe(ratio)


def _reason(error: Exception) -> str:
    """What the process said last, if it said anything."""
    said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return str(said.splitlines()[-1]) if said else str(error)


def measured_ratio(
    config: Mapping[str, Any] = CONFIG, settings: TrainSettings = SETTINGS, rows: int = 2, length: int = 257
) -> float:
    """Train a random model on made rows in this process: measured over replayed, of what changes."""
    import mlx.core as mx

    from tasks.models.device import on_gpu
    from tasks.models.load import use_fast_code
    from tasks.prepare.splits import TokenRows
    from tasks.train.adapters import adapter_config, add_adapter
    from tasks.train.loop import fit
    from tasks.train.memory.calibration import Calibration
    from tasks.train.memory.estimate import estimate_from_config
    from tasks.train.memory.row_sizes import RowSizes
    from tasks.train.memory_guard import holding_back
    from tasks.train.outline import outline
    from tasks.train.targets import target_keys

    made = TokenRows.from_rows([(range(length), [True] * length)] * rows)
    predicted = estimate_from_config(settings, config, RowSizes.of(made), calibrated=Calibration())
    network = outline(config)
    network.set_dtype(mx.bfloat16 if on_gpu() else mx.float32)
    mx.eval(network.parameters())
    use_fast_code(network)
    keys = target_keys(network, settings.targets, settings.num_layers)
    add_adapter(network, adapter_config(settings, len(network.layers), keys), settings.seed)
    with nullcontext() if predicted.limit_bytes is None else holding_back(predicted.limit_bytes):
        training = fit(network, made, made, settings, lambda step, metrics: None)
    changing = changing_bytes(predicted.at_peak)
    return (training.peak_memory * 1e9 - (predicted.peak_bytes - changing)) / changing
