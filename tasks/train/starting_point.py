"""`train.from_adapter`: a training that begins with the weights of an adapter there is already.

What is trained then is what the adapter has: settings that are left at their defaults are taken from it, one
that says something else is a contradiction and refused. From there on it is a training like any other.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import mlx.nn as nn

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.fingerprints import file_digest
from tasks.models.folder import ModelFolder
from tasks.publish import fingerprint
from tasks.train import low_rank, soft_prompt
from tasks.train.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_weights,
    checked_weights,
    read_adapter_config,
)
from tasks.train.low_rank import low_rank_scale
from tasks.train.outline import outline
from tasks.train.peft_config import LOW_RANK, is_peft, read_peft_config
from tasks.train.peft_import import as_mlx_adapter
from tasks.train.targets import ALL_LINEAR, target_keys

log = logging.getLogger(__name__)


def check_starting_point(settings: TrainSettings) -> None:
    """Refuse a `train.from_adapter` that is no adapter, as far as its config says it, or of another method.

    Raises:
        InputError: with what is wrong with it.
    """
    if settings.from_adapter is None:
        return
    folder = Path(settings.from_adapter).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"train.from_adapter = '{settings.from_adapter}': no such folder ({folder.absolute()}); give an "
            "adapter's folder, as mlx-lm or PEFT writes it"
        )
    kind = _kind(folder)
    if kind != settings.method and not {kind, settings.method} <= set(low_rank.KINDS):
        raise InputError(
            f"train.from_adapter = '{settings.from_adapter}': is of method {kind}, train.method is "
            f"{settings.method}; set train.method={kind}"
        )


def begin_from(settings: TrainSettings, model: ModelFolder) -> tuple[TrainSettings, Path | None]:
    """The settings with what the adapter decides, and its folder in mlx-lm's layout.

    Without `train.from_adapter` the settings as they are, and None.

    Raises:
        InputError: the adapter is not sound or not for this base, or a setting contradicts it.
    """
    if settings.from_adapter is None:
        return settings, None
    check_starting_point(settings)
    adapter = as_mlx_adapter(Path(settings.from_adapter).expanduser(), model)
    taken = _taken(settings, read_adapter_config(adapter), model)
    _check_agreement(settings, taken, model)
    log.info("training begins with the adapter %s: %s", settings.from_adapter, taken)
    return settings.model_copy(update=taken), adapter


def adapter_fingerprint(adapter: Path) -> str:
    """Of its weights and config: equal for equal contents."""
    return fingerprint({name: file_digest(adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE)})


def take_weights(network: nn.Module, adapter: Path) -> None:
    """Put the adapter's weights in the place of those drawn, in their type, on a network it is added to.

    Raises:
        InputError: they are not those that the network has to have.
    """
    drawn = adapter_weights(network)
    weights = checked_weights(adapter, drawn)
    network.load_weights([(name, weights[name].astype(drawn[name].dtype)) for name in drawn], strict=False)


def _kind(folder: Path) -> str:
    """The method of an adapter's folder, of either layout; `InputError` when it is not sound."""
    if not is_peft(folder):
        return str(read_adapter_config(folder)["fine_tune_type"])
    peft = read_peft_config(folder)
    return peft.method if peft.kind == LOW_RANK else soft_prompt.KIND


def _taken(settings: TrainSettings, config: dict[str, Any], model: ModelFolder) -> dict[str, Any]:
    """Settings that the adapter decides; its dropout only where none is set."""
    method = config["fine_tune_type"]
    if method not in low_rank.KINDS:
        key = "num_layers" if "num_layers" in config else "prompt_tokens"
        return {"method": method, key: config[key]}
    parameters = config["lora_parameters"]
    return {
        "method": method,
        "num_layers": _as_number(config["num_layers"], model),
        "targets": tuple(parameters["keys"]) if parameters.get("keys") else (ALL_LINEAR,),
        "rank": parameters["rank"],
        "scale": parameters["scale"],
        "dropout": settings.dropout or parameters["dropout"],
    }


def _check_agreement(settings: TrainSettings, taken: dict[str, Any], model: ModelFolder) -> None:
    """Refuse the first setting that is neither its default nor what the adapter has."""
    defaults = TrainSettings()
    for name in ("method", "num_layers", "rank", "prompt_tokens"):
        given, has = getattr(settings, name), taken.get(name)
        if name == "num_layers" and taken["method"] in low_rank.KINDS:
            given = _as_number(given, model)
        if has is not None and given not in (getattr(defaults, name), has):
            raise _contradiction(settings, f"train.{name} = {getattr(settings, name)!r}", has)
    if taken["method"] not in low_rank.KINDS:
        return
    same = {"rank": taken["rank"]}
    scale = low_rank_scale(settings.model_copy(update=same))
    unset = low_rank_scale(defaults.model_copy(update=same))
    if not any(math.isclose(scale, each, rel_tol=1e-6) for each in (taken["scale"], unset)):
        raise _contradiction(settings, f"a scale of {scale:g} (train.scale, train.alpha)", taken["scale"])
    if settings.targets != defaults.targets:
        network = outline(model.config())
        given, has = (
            target_keys(network, names, taken["num_layers"]) for names in (settings.targets, taken["targets"])
        )
        if given != has:
            raise _contradiction(settings, f"train.targets = {', '.join(settings.targets)}", ", ".join(has))


def _contradiction(settings: TrainSettings, given: str, has: object) -> InputError:
    return InputError(
        f"{given}: the adapter of train.from_adapter ({settings.from_adapter}) has {has}; leave the setting "
        "out, it is taken from the adapter"
    )


def _as_number(num_layers: int, model: ModelFolder) -> int:
    layers: int = model.language_config()["num_hidden_layers"]
    return layers if num_layers == -1 else num_layers
