"""Merge an adapter into its base weights, and prove that the result is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import FuseSettings
from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import TEMPLATE_FILE, load_template
from tasks.prepare.splits import TokenRows, load_splits
from tasks.progress import progress
from tasks.publish import StepOutput, run_step, write_json

if TYPE_CHECKING:
    import mlx.nn as nn

PROOF_ROWS = 8
"""Test rows on which fused model and adapter are compared."""

FUSION_FILE = "fusion.json"


def fuse_adapter(
    settings: FuseSettings, model: ModelFolder, adapter: StepOutput, data: StepOutput
) -> StepOutput:
    """Write the merged model as an MLX model folder, published only when it equals the adapter.

    A quantised base is dequantised: quantising again can lose more than the adapter added. The
    written files are loaded again for the proof; `fusion.json` holds both losses.

    Raises:
        InputError: the adapter is a soft prompt.
        StepError: the relative difference of the losses is over `fuse.tolerance`.
    """
    inputs = {
        "model": model.fingerprint,
        "adapter": adapter.fingerprint,
        "data": data.fingerprint,
        "settings": settings.model_dump(mode="json"),
    }
    return run_step("fuse", inputs, lambda draft: _fuse(draft, settings, model.path, adapter.path, data))


def _fuse(draft: Path, settings: FuseSettings, model: Path, adapter: Path, data: StepOutput) -> None:
    from tasks.models.load import load_model
    from tasks.models.write import write_model
    from tasks.train.adapters import load_adapter

    _check_kind(adapter)
    rows = load_splits(data.path)["test"].first(PROOF_ROWS)
    with progress("fusing"):
        loaded = load_model(model)
        load_adapter(loaded.model, adapter)
        expected = _loss(loaded.model, rows)
        _merge(loaded.model)
        write_model(draft, loaded.model, _unquantised(loaded.config), model)
        if template := load_template(data.path):
            (draft / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        del loaded
        actual = _loss(load_model(draft).model, rows)
    difference = abs(actual - expected) / expected
    if not difference <= settings.tolerance:
        raise StepError(
            f"the fused model's test loss is {actual:.5f}, the adapter's {expected:.5f}: "
            f"{difference:.2e} apart, over fuse.tolerance = {settings.tolerance:g}; nothing was written"
        )
    write_json(
        draft / FUSION_FILE,
        {
            "adapter_loss": expected,
            "fused_loss": actual,
            "relative_difference": difference,
            "rows": len(rows),
        },
    )


def _check_kind(adapter: Path) -> None:
    from tasks.train import soft_prompt
    from tasks.train.adapters import read_adapter_config

    if read_adapter_config(adapter)["fine_tune_type"] == soft_prompt.KIND:
        raise InputError(
            f"{adapter}: a soft prompt is a part of the input, there are no weights to merge it into; "
            "set fuse.enabled=false and use it with its base model"
        )


def _merge(network: nn.Module) -> None:
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


def _unquantised(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def _loss(network: nn.Module, rows: TokenRows) -> float:
    from tasks.train.loss import mean_loss

    return mean_loss(network, rows, PROOF_ROWS, "fused against adapter")
