"""The fused model quantised: as its base was, or to chosen bits; kept only where it keeps the adapter.

Rounding weights to a few bits can undo what training changed: on a small model re-quantising moved the
weights by 8.8e-4 where the adapter had moved them by 7.2e-4. So the measure is what the adapter itself
changed: the fall of the test loss, and the greedy tokens that are no longer the base's.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import FuseSettings, QuantizeSettings
from tasks.fuse.fidelity import Behaviour, Difference, compare
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.prepare.splits import TokenRows

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

log = logging.getLogger(__name__)

Layer = dict[str, Any]
"""`group_size`, `bits` and `mode` of a quantised layer."""


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised.

    Attributes:
        usual: of most layers.
        layers: those that are quantised, by path; None for all whose width allows it.
        dtype: of scales and of what is not quantised; None for that of the model at hand.
    """

    usual: Layer
    layers: Mapping[str, Layer] | None = None
    dtype: mx.Dtype | None = None

    def __str__(self) -> str:
        return f"{self.usual['bits']} bits in groups of {self.usual['group_size']}"


def quantise_in_place(
    folder: Path, settings: FuseSettings, base: Path, rows: TokenRows, expected: Behaviour
) -> dict[str, Any]:
    """Quantise a fused model's folder as `fuse.quantize` says, or leave it as it is, with a warning why.

    Returns:
        The figures for fusion.json; `form` is "quantised" where the folder now holds that.
    """
    from tasks.models.load import load_model

    plan = _plan(settings, base)
    if plan is None:
        return {}
    trial = folder / "quantised"
    if not _write_quantised(folder, trial, plan):
        return {}
    found = compare(load_model(trial).model, rows, expected)
    before = compare(load_model(base).model, rows, expected)
    figures = {"quantisation": plan.usual, "quantised": asdict(found), "base": asdict(before)}
    if fault := _fault(settings, expected, found, before):
        shutil.rmtree(trial)
        log.warning("fuse: the model is not quantised to %s: %s; the dequantised form is kept", plan, fault)
        return figures
    _put_in_place(trial, folder)
    log.info("fuse: quantised to %s: test loss %.5f, adapter %.5f", plan, found.loss, expected.loss)
    return {"form": "quantised", **figures}


def _plan(settings: FuseSettings, base: Path) -> Quantisation | None:
    if isinstance(settings.quantize, QuantizeSettings):
        return Quantisation({**settings.quantize.model_dump(), "mode": "affine"})
    plan = base_quantisation(base)
    if plan is None:
        log.info("fuse: the base is not quantised, and neither is the fused model")
    return plan


def base_quantisation(folder: Path) -> Quantisation | None:
    """How a model folder is quantised, read from the layers that mlx_lm builds; None when it is not."""
    import_mlx_lm()
    from mlx_lm.utils import load_model

    # Lazy: no weight is read for this.
    network, _ = load_model(folder, lazy=True, strict=True, trust_remote_code=False)
    quantised = {path: module for path, module in network.named_modules() if hasattr(module, "bits")}
    if not quantised:
        return None
    layers = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in quantised.items()
    }
    [(usual, _)] = Counter(tuple(layer.items()) for layer in layers.values()).most_common(1)
    scales = Counter(module.scales.dtype for module in quantised.values())
    floats = {dtype: count for dtype, count in scales.items() if _is_float(dtype)}
    return Quantisation(dict(usual), layers, max(floats, key=floats.__getitem__) if floats else None)


def _is_float(dtype: mx.Dtype) -> bool:
    import mlx.core as mx

    return bool(mx.issubdtype(dtype, mx.floating))  # the scales of mxfp4 are bytes


def _write_quantised(folder: Path, target: Path, plan: Quantisation) -> bool:
    """Write the model of `folder` quantised; False, with a warning, when the plan fits no layer."""
    import_mlx_lm()
    from mlx_lm.utils import load_model, quantize_model

    from tasks.models.write import write_model

    network, config = load_model(folder, lazy=True, strict=True, trust_remote_code=False)
    if plan.dtype is not None:
        network.set_dtype(plan.dtype)
    with redirect_stdout(io.StringIO()):  # mlx_lm prints the bits per weight
        network, config = quantize_model(network, config, **plan.usual, quant_predicate=_predicate(plan))
    if not any(hasattr(module, "bits") for module in network.modules()):
        log.warning(
            "fuse: no matrix of the model has a width that is a multiple of fuse.quantize.group_size = %d; "
            "it stays dequantised",
            plan.usual["group_size"],
        )
        return False
    target.mkdir()
    write_model(target, network, config, folder)
    return True


def _predicate(plan: Quantisation) -> Any:
    """For mlx_lm's `quantize_model`: which layers, and how where it is not the usual way."""
    layers = plan.layers
    if layers is None:
        return None

    def chosen(path: str, module: nn.Module) -> bool | Layer:
        layer = layers.get(path)
        return layer == plan.usual or (dict(layer) if layer else False)

    return chosen


def _fault(settings: FuseSettings, expected: Behaviour, found: Difference, before: Difference) -> str | None:
    """What of the adapter the quantised form has lost, beyond what `fuse.keep` allows; None if it has not."""
    may_lose = 1 - settings.keep
    gain = before.loss - expected.loss
    if not found.loss - expected.loss <= max(may_lose * gain, settings.tolerance * max(expected.loss, 1.0)):
        return (
            f"its test loss would be {found.loss:.5f}, the adapter's is {expected.loss:.5f} and the base's "
            f"{before.loss:.5f}: less than fuse.keep = {settings.keep:g} of the gain would be left"
        )
    if not found.tokens <= max(may_lose * before.tokens, settings.token_tolerance):
        return (
            f"it would choose {found.tokens:.1%} of the adapter's greedy tokens otherwise, the base does so "
            f"with {before.tokens:.1%}: less than fuse.keep = {settings.keep:g} of the change would be left "
            f"(test loss {found.loss:.5f}, adapter {expected.loss:.5f}, base {before.loss:.5f})"
        )
    return None


def _put_in_place(trial: Path, folder: Path) -> None:
    """Exchange a folder's files for those of a folder within it."""
    for path in folder.iterdir():
        if path != trial:
            path.unlink()
    for path in trial.iterdir():
        path.rename(folder / path.name)
    trial.rmdir()
