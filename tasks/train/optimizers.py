"""The optimizers of MLX by name, set up as their papers mean them, and their state as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from tasks.config import TrainSettings
from tasks.errors import StepError

SGD_MOMENTUM = 0.9
"""The usual one, of every common recipe for SGD; MLX's default is none."""

MUON_ADAMW_RATE = 3e-4 / 0.02
"""AdamW's learning rate over Muon's: the defaults of Muon's author (github.com/KellerJordan/Muon)."""

Belongs = Callable[[str, mx.array], bool]


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer of these settings; its learning rate is set before each update.

    With `lora_plus_ratio` the B matrices of LoRA have their own learning rate (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354); with muon `learning_rate` is Muon's, and what is no hidden matrix is AdamW's.
    """
    groups = _muon_groups(settings) if settings.optimizer == "muon" else [_Group(_make(settings))]
    if settings.lora_plus_ratio > 1:
        muon = settings.optimizer == "muon"
        faster = _Muon(settings, inputs_first=True) if muon else _make(settings)
        groups.insert(0, _Group(faster, _is_lora_b, settings.lora_plus_ratio))
    return groups[0].optimizer if len(groups) == 1 else GroupedOptimizer(groups)


def set_learning_rate(optimizer: optim.Optimizer, value: float) -> None:
    """Set the learning rate of the next update; that of each group keeps its ratio to `value`."""
    optimizer.learning_rate = value


def optimizer_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's arrays by name, in sorted order."""
    return dict(sorted(dict(tree_flatten(optimizer.state)).items()))


def restore_optimizer(optimizer: optim.Optimizer, model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Put back what `optimizer_state` gave: the next updates equal those of the optimizer it came from.

    Raises:
        StepError: the arrays are those of another optimizer or of other parameters.
    """
    if arrays.keys() != optimizer_state(optimizer).keys():  # else it was saved before its first update
        optimizer.init(model.trainable_parameters())
    expected = {name: array.shape for name, array in optimizer_state(optimizer).items()}
    found = {name: array.shape for name, array in arrays.items()}
    if odd := sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)):
        raise StepError(
            f"the optimizer's saved state is of another run: {odd[0]} is {found.get(odd[0])}, expected "
            f"{expected.get(odd[0])}; remove the checkpoint to start again"
        )
    optimizer.state = tree_map_with_path(lambda name, _: arrays[name], optimizer.state)


@dataclass(frozen=True)
class _Group:
    """Parameters that share an optimizer, and its learning rate over that of the settings."""

    optimizer: optim.Optimizer
    belongs: Belongs = lambda name, array: True
    relative_rate: float = 1.0


class GroupedOptimizer(optim.MultiOptimizer):
    """An optimizer a group of parameters; a parameter is of the first group that it belongs to."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        super().__init__([group.optimizer for group in groups], [group.belongs for group in groups[:-1]])
        self.relative_rates = [group.relative_rate for group in groups]

    @property
    def learning_rate(self) -> mx.array:
        """That of the settings, which each group's is relative to."""
        rate: mx.array = self.optimizers[-1].learning_rate / self.relative_rates[-1]
        return rate

    @learning_rate.setter
    def learning_rate(self, value: float | mx.array) -> None:
        for optimizer, relative in zip(self.optimizers, self.relative_rates, strict=True):
            optimizer.learning_rate = value * relative


class _Muon(optim.Muon):
    """Muon as its author has it: decoupled weight decay, updates scaled by √(outputs / inputs) from 1 up.

    MLX's (0.32.4) adds the decay to the gradient, which orthogonalising then distorts, and takes every
    matrix for (outputs, inputs); LoRA's are (inputs, outputs).
    """

    def __init__(self, settings: TrainSettings, inputs_first: bool = False) -> None:
        super().__init__(settings.learning_rate, weight_decay=0.0)
        self.decoupled_decay = settings.weight_decay
        self.inputs_first = inputs_first

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The updated parameter; `state` holds the momentum."""
        parameter = parameter * (1 - self.learning_rate.astype(parameter.dtype) * self.decoupled_decay)
        updated: mx.array
        if not self.inputs_first:
            updated = super().apply_single(gradient, parameter, state)
            return updated
        turned = {"v": state["v"].T}
        updated = super().apply_single(gradient.T, parameter.T, turned)
        state["v"] = turned["v"].T
        return updated.T


def _make(settings: TrainSettings) -> optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    match settings.optimizer:
        case "adam":
            return optim.Adam(rate, bias_correction=True)
        case "sgd":
            return optim.SGD(rate, momentum=SGD_MOMENTUM, weight_decay=decay)
        case "lion":
            return optim.Lion(rate, weight_decay=decay)
        case "adafactor":
            # The learning rate is the schedule's, so neither Adafactor's own nor its scaling by the
            # parameter's size, which would all but stop LoRA's B, which begins at zero.
            return optim.Adafactor(rate, weight_decay=decay, scale_parameter=False, relative_step=False)
        case _:
            return optim.AdamW(rate, weight_decay=decay, bias_correction=True)


def _muon_groups(settings: TrainSettings) -> list[_Group]:
    """Muon for the matrices of hidden layers; AdamW for embeddings, head, vectors and soft prompts."""
    return [
        _Group(_Muon(settings, inputs_first=True), _is_low_rank),
        _Group(_Muon(settings), _is_hidden_matrix),
        _Group(_make(settings), relative_rate=MUON_ADAMW_RATE),
    ]


def _is_lora_b(name: str, array: mx.array) -> bool:
    return name.endswith("lora_b")


def _is_low_rank(name: str, array: mx.array) -> bool:
    return name.endswith(("lora_a", "lora_b")) and array.ndim == 2


def _is_hidden_matrix(name: str, array: mx.array) -> bool:
    """A layer's number is in the name of what it holds; embeddings and head stand beside the layers."""
    return array.ndim == 2 and any(part.isdigit() for part in name.split("."))
