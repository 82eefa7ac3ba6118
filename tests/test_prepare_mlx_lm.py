"""`mlx_lm.lora --data` takes prepared data as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tasks.config import DataSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data


def test_mlx_lm_trains_on_prepared_data(tmp_path: Path, tiny_model: ModelFolder) -> None:
    source = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"what is {n}?", "completion": f"it is {n}"} for n in range(300)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prepared = prepare_data(DataSettings(source=str(source)), tiny_model).path
    adapter = tmp_path / "adapter"
    options = {
        "--model": tiny_model.path,
        "--data": prepared,
        "--adapter-path": adapter,
        "--iters": 3,
        "--batch-size": 2,
        "--num-layers": 2,
        "--val-batches": 1,
    }
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--test", "--mask-prompt", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Test loss" in done.stdout
    assert (adapter / "adapters.safetensors").is_file()
