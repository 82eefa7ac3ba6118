"""What PEFT's `adapter_config.json` says, as far as mlx-lm's layers can do it; the rest is refused."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.train.peft_layout import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

log = logging.getLogger(__name__)

LOW_RANK, PROMPT = "LORA", "PROMPT_TUNING"

READ = {
    LOW_RANK: {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"),
        *("rank_pattern", "alpha_pattern", "init_lora_weights"),
    },
    PROMPT: {"peft_type", "num_virtual_tokens", "num_transformer_submodules"},
}

WITHOUT_EFFECT = {
    LOW_RANK: {
        *("layers_to_transform", "layers_pattern", "exclude_modules"),  # the tensors' names say it
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # init_lora_weights says it
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),  # of settings that are refused
    },
    PROMPT: {
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        *("token_dim", "num_attention_heads", "num_layers"),  # the tensor's shape says it
    },
}

RECORDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
}

WITHOUT_EQUIVALENT = {
    "alora_invocation_tokens": "it is active only after certain tokens",
    "arrow_config": "it is routed among several adapters",
    "bias": "biases of the base are trained with it",
    "fan_in_fan_out": "the base keeps its matrices transposed",
    "kasa_config": "it is a variant of LoRA with another product",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "its B has a bias",
    "megatron_config": "its modules are spread over several devices",
    "modules_to_save": "whole modules are kept beside the matrices",
    "monteclora_config": "it is a variant of LoRA with another product",
    "target_parameters": "it adapts parameters that are no linear modules",
    "trainable_token_indices": "rows of the embedding are trained with it",
    "use_bdlora": "it is a variant of LoRA with another product",
    "use_qalora": "its inputs are pooled in groups",
    "velora_config": "it is a variant of LoRA with another product",
}
"""Keys that change what is computed in ways mlx-lm has no layer for, and how."""

BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA change it."""

PLAIN_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class PeftConfig:
    """A checked `adapter_config.json`.

    Attributes:
        path: of the file, for messages.
        values: the JSON object.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """`LOW_RANK` or `PROMPT`."""
        return str(self.values["peft_type"])

    @property
    def method(self) -> str:
        """mlx-lm's `fine_tune_type` of a low-rank adapter."""
        return "dora" if self.values.get("use_dora") else "lora"

    @property
    def dropout(self) -> float:
        """Of the input of each adapter, in training."""
        return float(self.values.get("lora_dropout", 0.0))

    def rank(self, module: str) -> int:
        """The rank that the config gives a module, by its path."""
        return int(_of_pattern(self.values.get("rank_pattern"), module, self.values["r"]))

    def scale(self, module: str) -> float:
        """alpha / rank of a module, or alpha / √rank when stabilised."""
        alpha = float(_of_pattern(self.values.get("alpha_pattern"), module, self.values["lora_alpha"]))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether `target_modules` means a module; where it is an expression, any."""
        names = self.values.get("target_modules")
        if not isinstance(names, list):
            return True
        return any(module == name or module.endswith(f".{name}") for name in names)


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's layout, sound or not."""
    if any((folder / name).is_file() for name in (WEIGHTS_FILE, PICKLE_FILE)):
        return True
    try:
        return "peft_type" in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_peft_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder of PEFT, every key of it accounted for.

    Raises:
        InputError: a file is missing, the weights are a pickle, or a key means what mlx-lm cannot do.
    """
    path = folder / CONFIG_FILE
    _check_files(folder)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}, expected an object; fetch it again")
    kind = values.get("peft_type")
    if kind not in READ:
        raise InputError(
            f"{path}: peft_type = {kind!r}; of PEFT's kinds {LOW_RANK} (DoRA among it) and {PROMPT} can be "
            "read: merge it into its base with PEFT (merge_and_unload) and use the merged model"
        )
    _check_keys(path, kind, values)
    _check_values(path, kind, values)
    return PeftConfig(path, values)


def peft_base(folder: Path) -> str:
    """The base model that an adapter folder of PEFT names.

    Raises:
        InputError: as `read_peft_config`, or it names none.
    """
    peft = read_peft_config(folder)
    name = peft.values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{peft.path}: base_model_name_or_path = {name!r} names no base model; put its hub name or its "
            "folder there"
        )
    return name


def _check_files(folder: Path) -> None:
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / PICKLE_FILE).is_file():
            raise InputError(
                f"{folder / PICKLE_FILE}: is a pickle, which can run any code when it is read; have whoever "
                f"made it save it again with PEFT of today (save_pretrained), which writes {WEIGHTS_FILE}"
            )
        raise InputError(f"{folder}: has no {WEIGHTS_FILE}; give an adapter folder as PEFT writes it")
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: has no {CONFIG_FILE}; give an adapter folder as PEFT writes it")


def _check_keys(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    known = READ[kind] | WITHOUT_EFFECT[kind] | RECORDS
    for key, value in sorted(values.items()):
        off = value in (None, False, "none") or value == [] or value == {}
        if key in known or (off and key in WITHOUT_EQUIVALENT):
            continue
        if off:
            log.warning("%s: %s is not known here; it is %r, which is taken for off", path, key, value)
            continue
        reason = WITHOUT_EQUIVALENT.get(key, "it is not known what that changes")
        raise InputError(
            f"{path}: {key} = {_short(value)}: {reason}, and mlx-lm has no layer for that; merge the adapter "
            "into its base with PEFT (merge_and_unload) and use the merged model"
        )


def _check_values(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    if kind == PROMPT:
        if values.get("num_transformer_submodules") not in (None, 1):
            raise InputError(
                f"{path}: num_transformer_submodules = {values['num_transformer_submodules']!r}; only the "
                "prompt of a decoder (1) can be read"
            )
        return
    for key in ("r", "lora_alpha"):
        _check_number(path, key, values.get(key))
    dropout = values.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout = {dropout!r}; expected a share from 0 to under 1")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(path, key, values.get(key) or {})
    start = values.get("init_lora_weights")
    if start not in BASE_UNCHANGED:
        raise InputError(
            f"{path}: init_lora_weights = {start!r}: the adapter belongs to a base that this changed, not to "
            "the base as published; convert it with PEFT (path_initial_model_for_weight_conversion) first"
        )


def _check_pattern(path: Path, key: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: {key} holds a {type(pattern).__name__}, expected an object")
    for name, value in pattern.items():
        if not PLAIN_PATTERN.fullmatch(name):
            raise InputError(f"{path}: {key} has {name!r}, an expression; name the modules it means instead")
        _check_number(path, f"{key} of {name}", value)


def _check_number(path: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{path}: {key} = {value!r}; expected a number over 0")


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """As PEFT 0.21 finds it (`get_pattern_key`): the first name that the path ends with."""
    for pattern, value in (patterns or {}).items():
        name = pattern.removeprefix("^")
        if module == name or (pattern == name and module.endswith(f".{name}")):
            return value
    return default


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
