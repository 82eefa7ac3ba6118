"""What `tunesmith export` does for llama.cpp and Ollama: find weights and proof rows, and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from flows.targets import Target
from tasks.config import FuseSettings
from tasks.errors import InputError
from tasks.fuse.fidelity import observe, proof_rows
from tasks.fuse.gguf_export import Exported
from tasks.fuse.gguf_export import export_gguf as write_gguf
from tasks.fuse.gguf_export import export_gguf_lora as write_gguf_lora
from tasks.fuse.gguf_weights import Kind
from tasks.fuse.merge import fuse_adapter, read_behaviour
from tasks.home import runs_dir
from tasks.models.fingerprints import file_digest
from tasks.models.gguf_import import as_folder_name
from tasks.models.load import load_model
from tasks.publish import StepOutput, fingerprint
from tasks.train.adapters import CONFIG_FILE, WEIGHTS_FILE
from tasks.train.step import TRAINING_FILE


def export_gguf(target: Target, out: Path, kind: Kind) -> Exported:
    """A model, or base and adapter as one, as a GGUF file with a Modelfile in the new folder `out`.

    The weights are those of the dequantised fused model, proved against the adapter, and the file is
    proved against it once more.

    Raises:
        InputError: the model cannot be fused, or cannot be said in GGUF.
        StepError: the file is not the model it was made from.
    """
    name = as_folder_name(out.name)
    if target.adapter is None:
        rows = proof_rows(None, target.model.path)
        expected = observe(load_model(target.model.path).model, rows)
        return write_gguf(out, target.model.path, name, kind, rows, expected)
    data = prepared_data(target.adapter)
    adapter = StepOutput(target.adapter, adapter_fingerprint(target.adapter), True, 0.0)
    fused = fuse_adapter(FuseSettings(), target.model, adapter, data, target.template).path
    rows = proof_rows(data.path if data else None, target.model.path)
    return write_gguf(out, fused, name, kind, rows, read_behaviour(fused), target.system_prompt)


def export_gguf_lora(target: Target, out: Path, kind: Kind) -> Exported:
    """A LoRA adapter as a GGUF file, which lies over one of its base, in the new folder `out`.

    Raises:
        InputError: it has no adapter, or one that llama.cpp cannot have.
    """
    if target.adapter is None:
        raise InputError(
            f"{target.name}: is a model by itself, and --to gguf-lora is of an adapter; give a run, "
            "NAME@champion or an adapter's folder, or use --to gguf"
        )
    if kind != "f32":
        raise InputError(f"--type {kind}: an adapter is small and stays f32; leave --type out")
    name = as_folder_name(out.name)
    return write_gguf_lora(out, target.model, target.adapter, name, target.template, target.system_prompt)


EXPORTERS: Mapping[str, tuple[Callable[[Target, Path, Kind], Exported], Kind]] = {
    "gguf": (export_gguf, "f16"),
    "gguf-lora": (export_gguf_lora, "f32"),
}
"""By the name that `--to` takes, each with the number format it takes where none is given."""


def prepared_data(adapter: Path) -> StepOutput | None:
    """The prepared data an adapter was trained on; None where it is not known, or is there no longer."""
    training = adapter / TRAINING_FILE
    if not training.is_file():
        return None
    known = json.loads(training.read_text(encoding="utf-8")).get("inputs", {}).get("data")
    folder = runs_dir() / "steps" / "prepare" / str(known)
    return StepOutput(folder, folder.name, True, 0.0) if known and folder.is_dir() else None


def adapter_fingerprint(adapter: Path) -> str:
    """Of the two files that are the adapter."""
    return fingerprint({name: file_digest(adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})
