"""A LoRA adapter as a GGUF file for llama.cpp's `--lora`, over a GGUF file of its base model.

A module adds `alpha / rank * B A x` to its output; mlx-lm says `scale` for alpha / rank, and has both
matrices the other way round. GGUF's rows of q and k are permuted in Llama, so B's are too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.errors import InputError, StepError
from tasks.fuse.gguf_metadata import gguf_architecture
from tasks.fuse.gguf_weights import as_float32, in_row_order
from tasks.models.gguf_weights import gguf_name

if TYPE_CHECKING:
    import mlx.core as mx

    from tasks.models.folder import ModelFolder

Matrix = npt.NDArray[np.float32]


def write_gguf_lora(path: Path, model: ModelFolder, adapter: Path) -> None:
    """Write an adapter as a GGUF file, and read it back: every number is the adapter's own.

    Args:
        path: of the file, which must not exist.
        adapter: a folder in mlx-lm's layout.

    Raises:
        InputError: it is no LoRA, or is of a model or module that llama.cpp has no adapters for.
        StepError: the file read back holds something else.
    """
    from gguf import GGUFWriter

    from tasks.models.load import load_model
    from tasks.train.adapters import adapter_weights, load_adapter, read_adapter_config

    config = read_adapter_config(adapter)
    _refuse_other_than_lora(adapter, config["fine_tune_type"])
    loaded = load_model(model.path)
    architecture = gguf_architecture(loaded.config["model_type"])
    load_adapter(loaded.model, adapter)
    tensors = gguf_tensors(adapter_weights(loaded.model), loaded.model.args)
    parameters = config["lora_parameters"]
    alpha = float(parameters["scale"]) * int(parameters["rank"])
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_name(f"{model.name} LoRA")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, matrix in tensors.items():
        writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(path, tensors, alpha)


def gguf_tensors(weights: dict[str, mx.array], args: Any) -> dict[str, Matrix]:
    """A as `<tensor>.lora_a` (rank, inputs) and B as `<tensor>.lora_b` (outputs, rank), by GGUF's names.

    Args:
        weights: an adapter's, `lora_a` (inputs, rank) and `lora_b` (rank, outputs) of each module.
        args: of the model in mlx_lm.
    """
    tensors = {}
    for name, array in sorted(weights.items()):
        module, _, part = name.rpartition(".")
        target = gguf_name(f"{module}.weight")
        if target is None or array.ndim != 2:
            raise InputError(
                f"GGUF has no place for an adapter of {module}; export the fused model with --to gguf"
            )
        matrix = np.ascontiguousarray(as_float32(array).T)
        if part == "lora_b":
            matrix = np.ascontiguousarray(in_row_order(f"{module}.weight", matrix, args))
        tensors[f"{target}.{part}"] = matrix
    return tensors


def _refuse_other_than_lora(adapter: Path, kind: str) -> None:
    reasons = {
        "dora": "llama.cpp has no DoRA: its magnitudes have no place beside A and B",
        "full": "there are no A and B, the weights themselves were trained",
        "soft-prompt": "a soft prompt is a part of the input, which llama.cpp's adapters cannot hold",
    }
    if reason := reasons.get(kind):
        way = "use it with its base in MLX" if kind == "soft-prompt" else "export it fused, with --to gguf"
        raise InputError(f"{adapter}: {reason}; {way}")


def _check(path: Path, tensors: dict[str, Matrix], alpha: float) -> None:
    from tasks.models.gguf_check import read_gguf

    read = read_gguf(path)
    same = read.tensors.keys() == tensors.keys() and all(
        np.array_equal(np.asarray(read.tensors[name].data), matrix) for name, matrix in tensors.items()
    )
    if not same or not np.isclose(read.need("adapter.lora.alpha", float), alpha, rtol=1e-6):
        raise StepError(
            f"{path.name}: read back it is not the adapter that was written; nothing is published"
        )
