"""Merge an adapter into its base weights, and prove that the result is the same model."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import FuseSettings
from tasks.errors import InputError, StepError
from tasks.fuse.fidelity import Behaviour, Difference, compare, observe, proof_rows
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import TEMPLATE_FILE, load_template
from tasks.prepare.splits import TokenRows
from tasks.progress import progress
from tasks.publish import StepOutput, run_step, write_json

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger(__name__)

FUSION_FILE = "fusion.json"


def fuse_adapter(
    settings: FuseSettings,
    model: ModelFolder,
    adapter: StepOutput,
    data: StepOutput | None,
    template: str | None = None,
) -> StepOutput:
    """Write the merged model as an MLX model folder, published only when it equals the adapter.

    A quantised base is dequantised. With `fuse.quantize` the merged model is then quantised; where that
    loses what the adapter changed, the dequantised form is published instead, with a warning. Every form
    is loaded again from its files for the proof; `fusion.json` holds all figures.

    Args:
        data: its test rows are those of the proof; None where they are not known.
        template: the chat template in Jinja the adapter was trained with, where `data` cannot say it.

    Raises:
        InputError: the adapter is a soft prompt.
        StepError: the dequantised form is farther from the adapter than `fuse.tolerance` or
            `fuse.token_tolerance`.
    """
    inputs = {
        "model": model.fingerprint,
        "adapter": adapter.fingerprint,
        "data": data.fingerprint if data else None,
        "settings": settings.model_dump(mode="json"),
    }
    if data is None:
        inputs["template"] = template
    rows = proof_rows(data.path if data else None, model.path)
    template = load_template(data.path) if data else template
    return run_step(
        "fuse", inputs, lambda draft: _fuse(draft, settings, model.path, adapter.path, rows, template)
    )


def read_behaviour(fused: Path) -> Behaviour:
    """What the adapter did with the proof rows, for whoever makes another form of the fused model."""
    import json

    told = json.loads((fused / FUSION_FILE).read_text(encoding="utf-8"))
    return Behaviour(**told["adapter"])


def _fuse(
    draft: Path, settings: FuseSettings, model: Path, adapter: Path, rows: TokenRows, template: str | None
) -> None:
    _check_kind(adapter)
    with progress("fusing"):
        expected = _write_merged(draft, model, adapter, rows)
        if template:
            (draft / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        difference = _compare_files(draft, rows, expected)
    _check(settings, expected, difference)
    figures: dict[str, Any] = {
        "form": "dequantised",
        "rows": len(rows),
        "adapter": asdict(expected),
        "fused": asdict(difference),
    }
    if settings.quantize is not None:
        from tasks.fuse.quantised_form import quantise_in_place

        figures |= quantise_in_place(draft, settings, model, rows, expected)
    write_json(draft / FUSION_FILE, figures)


def _write_merged(draft: Path, model: Path, adapter: Path, rows: TokenRows) -> Behaviour:
    """Write base and adapter as one model, and tell what they do apart."""
    from tasks.models.load import load_model
    from tasks.models.write import write_model
    from tasks.train.adapters import load_adapter

    loaded = load_model(model)
    load_adapter(loaded.model, adapter)
    expected = observe(loaded.model, rows)
    merge_layers(loaded.model)
    write_model(draft, loaded.model, unquantised(loaded.config), model)
    return expected


def _compare_files(folder: Path, rows: TokenRows, expected: Behaviour) -> Difference:
    from tasks.models.load import load_model

    return compare(load_model(folder).model, rows, expected)


def _check(settings: FuseSettings, expected: Behaviour, found: Difference) -> None:
    if not found.relative <= settings.tolerance:
        raise StepError(
            f"the fused model's test loss is {found.loss:.5f}, the adapter's {expected.loss:.5f}: "
            f"{found.relative:.2e} apart, over fuse.tolerance = {settings.tolerance:g}; nothing was written"
        )
    if not found.tokens <= settings.token_tolerance:
        raise StepError(
            f"the fused model chooses {found.tokens:.1%} of the adapter's greedy tokens otherwise, over "
            f"fuse.token_tolerance = {settings.token_tolerance:g} (test loss {found.loss:.5f}, the adapter's "
            f"{expected.loss:.5f}); nothing was written"
        )


def _check_kind(adapter: Path) -> None:
    from tasks.train import soft_prompt
    from tasks.train.adapters import read_adapter_config

    if read_adapter_config(adapter)["fine_tune_type"] == soft_prompt.KIND:
        raise InputError(
            f"{adapter}: a soft prompt is a part of the input, there are no weights to merge it into; "
            "set fuse.enabled=false and use it with its base model"
        )


def merge_layers(network: nn.Module) -> None:
    """Exchange adapted layers for their merged form and quantised ones for plain ones, nothing evaluated."""
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model

    merged = [(name, _merged(layer)) for name, layer in network.named_modules() if hasattr(layer, "fuse")]
    network.update_modules(tree_unflatten(merged))
    dequantize_model(network)


def _merged(layer: nn.Module) -> nn.Module:
    """The layer's merged form, in the type its base has: DoRA's (mlx_lm 0.32.2) comes out as float32."""
    base = layer.linear
    dtype = (base.scales if "scales" in base else base.weight).dtype
    merged: nn.Module = layer.fuse(dequantize=True)
    merged.weight = merged.weight.astype(dtype)
    return merged


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what says how weights are quantised."""
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
