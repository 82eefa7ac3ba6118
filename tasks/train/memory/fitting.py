"""What fits into a budget, and which settings to change first when something does not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.device import on_gpu
from tasks.train.memory.estimate import MemoryEstimate, Prefixed, estimate_from_config
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.skeleton import stored_dtype

LEAST_LENGTH = 64

DEPTHS = (16, 8, 4, 2, 1)
RANKS = (64, 32, 16, 8, 4)
BITS = (8, 4)


@dataclass(frozen=True)
class Plan:
    """All that decides a run's memory.

    Attributes:
        config: the base's `config.json`.
        prefixed: see `estimate_from_config`.
    """

    settings: TrainSettings
    config: Mapping[str, Any]
    train: RowSizes
    valid: RowSizes
    prefixed: Prefixed | None = None

    def estimate(self) -> MemoryEstimate:
        """The predicted peak."""
        return estimate_from_config(self.settings, self.config, self.train, self.valid, self.prefixed)

    def with_settings(self, **changes: Any) -> Plan:
        """The plan with other settings."""
        return replace(self, settings=self.settings.model_copy(update=changes))

    def with_bits(self, bits: int) -> Plan:
        """The plan on the base quantised."""
        return replace(self, config={**self.config, "quantization": {"bits": bits, "group_size": 64}})

    def rows_of(self, tokens: int) -> Plan:
        """The plan on rows of that length, as much of them supervised as of the longest now."""
        share = float(self.train.supervised.max() / self.train.lengths.max())
        rows = RowSizes.alike(tokens, max(1, round(share * tokens)))
        return replace(self, train=rows, valid=rows)


@dataclass(frozen=True)
class Change:
    """A change of settings, as it would be given on the command line.

    Attributes:
        overrides: `section.key=value`.
        why: what it costs.
        plan: with this change and those before it.
    """

    overrides: tuple[str, ...]
    why: str
    plan: Plan
    peak_bytes: int


def nearest_that_fits(plan: Plan, budget_bytes: int, training_only: bool = False) -> list[Change] | None:
    """Changes, each after those before it, that bring the peak under the budget; None where none does.

    In the order that costs least quality: recompute, accumulate, 8 and 4 bits, fewer layers, lower rank. A
    change that saves nothing is left out.

    Args:
        training_only: leave the base as it is.
    """
    peak = plan.estimate().peak_bytes
    made: list[Change] = []
    for overrides, why, change in _changes(plan, training_only):
        if peak <= budget_bytes:
            break
        try:
            changed = change(plan)
            estimated = changed.estimate().peak_bytes
        except InputError:  # not with this method or this base
            continue
        if estimated < peak:
            plan, peak = changed, estimated
            key = overrides.partition("=")[0]  # a later value of a setting takes the place of an earlier one
            made = [each for each in made if not each.overrides[0].startswith(f"{key}=")]
            made.append(Change(tuple(overrides.split()), why, changed, peak))
    return made if peak <= budget_bytes else None


Steps = Iterator[tuple[str, str, Callable[[Plan], Plan]]]


def _changes(plan: Plan, training_only: bool) -> Steps:
    yield from _of_speed(plan)
    if may_be_quantised(plan.config) and not training_only:
        for bits in BITS:
            override = f"model.quantize={{bits:{bits}}}"
            yield override, f"a base of {bits} bits", partial(Plan.with_bits, bits=bits)
    yield from _of_quality(plan.settings)


def _of_speed(plan: Plan) -> Steps:
    """Those that leave what is learnt as it is."""
    settings = plan.settings
    if not settings.grad_checkpoint:
        why = "activations are computed again: a third slower"
        yield "train.grad_checkpoint=true", why, lambda plan: plan.with_settings(grad_checkpoint=True)
    batch, steps = settings.batch_size, settings.accumulation_steps
    while batch > 1 and batch % 2 == 0:
        batch, steps = batch // 2, steps * 2
        override = f"train.batch_size={batch} train.accumulation_steps={steps}"
        yield (
            override,
            "the same update in smaller batches",
            partial(Plan.with_settings, batch_size=batch, accumulation_steps=steps),
        )


def _of_quality(settings: TrainSettings) -> Steps:
    if settings.method == "soft-prompt" or settings.from_adapter:
        return
    deepest = settings.num_layers if settings.num_layers > 0 else 1 << 30
    for depth in (depth for depth in DEPTHS if depth < deepest):
        yield f"train.num_layers={depth}", "fewer layers are adapted", _setting("num_layers", depth)
    if settings.method != "full":
        for rank in (rank for rank in RANKS if rank < settings.rank):
            yield f"train.rank={rank}", "smaller adapters", _setting("rank", rank)


def _setting(name: str, value: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan.with_settings(**{name: value})


@dataclass(frozen=True)
class Largest:
    """The largest value of a setting that fits while the others stay; None where none does.

    Attributes:
        bits: of the base's weights; None where it is as it is configured, and no other is told of.
        plain, checkpointed: without and with gradient checkpointing.
    """

    setting: str
    bits: int | None
    plain: int | None
    checkpointed: int | None


def what_fits(plan: Plan, budget_bytes: int, layers: int) -> Iterator[Largest]:
    """The largest batch, number of layers, rank and row length, each by itself, on each of `bases`."""
    scales: dict[str, tuple[Sequence[int], Callable[[Plan, int], Plan]]] = {
        "train.batch_size": ([1 << power for power in range(8)], _with("batch_size")),
        "train.num_layers": (_depths(layers), _with("num_layers")),
        "train.rank": ([1 << power for power in range(2, 10)], _with("rank")),
        "tokens a row": (
            [LEAST_LENGTH << power for power in range(10)],
            lambda plan, tokens: plan.rows_of(tokens),
        ),
    }
    if plan.settings.method in ("full", "soft-prompt"):
        del scales["train.rank"]
    if plan.settings.method == "soft-prompt":
        del scales["train.num_layers"]
    for name, (values, change) in scales.items():
        for bits, base in bases(plan).items():
            found = [
                _largest(base.with_settings(grad_checkpoint=recompute), values, change, budget_bytes)
                for recompute in (False, True)
            ]
            yield Largest(name, bits, *found)


def bases(plan: Plan) -> dict[int | None, Plan]:
    """By bits, the plan on its base as it is, and quantised where it may be and is not trained itself."""
    if not may_be_quantised(plan.config) or plan.settings.method == "full":
        return {None: plan}
    return {8 * stored_dtype(plan.config).size: plan, **{bits: plan.with_bits(bits) for bits in BITS}}


def may_be_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the base's bits are open, and count: on a CPU every base is held as float32."""
    return on_gpu() and not {"quantization", "quantization_config"} & config.keys()


def _depths(layers: int) -> list[int]:
    return [*(1 << power for power in range(10) if 1 << power < layers), layers]


def _with(name: str) -> Callable[[Plan, int], Plan]:
    return lambda plan, value: plan.with_settings(**{name: value})


def _largest(
    plan: Plan, values: Sequence[int], change: Callable[[Plan, int], Plan], budget_bytes: int
) -> int | None:
    """The last of the ascending values whose peak is within the budget: memory grows with all of them."""

    def over(value: int) -> bool:
        return change(plan, value).estimate().peak_bytes > budget_bytes

    place = bisect_left(values, True, key=over)
    return values[place - 1] if place else None
