"""The memory model: what it counts, that its replay is what MLX does, and what it is used for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_networks import COMMON, CONFIGS

from tasks.config import TrainSettings
from tasks.errors import InputError
from tasks.models.device import on_gpu
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, count_parameters
from tasks.train.memory import estimate as estimating
from tasks.train.memory import fitting, probe
from tasks.train.memory.backends import CPU
from tasks.train.memory.budget import Allowed, in_words, within_budget
from tasks.train.memory.calibration import CHANGING, Calibration, calibration, learn, note_probe
from tasks.train.memory.estimate import (
    LOOKED_AT,
    Breakdown,
    MemoryEstimate,
    Prefixed,
    estimate_from_config,
    estimate_memory,
)
from tasks.train.memory.fitting import Plan, bases, nearest_that_fits, what_fits
from tasks.train.memory.fusion import fused
from tasks.train.memory.graph import graph_of, instead_of
from tasks.train.memory.probe import CONFIG, calibrate_once
from tasks.train.memory.replay import BEYOND, highest
from tasks.train.memory.row_sizes import RowSizes
from tasks.train.memory.skeleton import leave_out, skeleton
from tasks.train.memory.traced_step import flat
from tasks.train.memory_guard import holding_back
from tasks.train.outline import outline

ROWS = RowSizes.alike(length=65, supervised=32)
TINY = {**COMMON, "model_type": "llama"}

TRACED = [kind for kind in CONFIGS if kind not in ("rwkv7", "mamba")]
"""Recurrent networks are no architecture of the training speed's proof."""


@pytest.fixture
def data(tmp_path: Path, token_rows: TokenRows) -> StepOutput:
    save_splits(tmp_path, dict.fromkeys(("train", "valid", "test"), token_rows))
    return StepOutput(tmp_path, "data", False, 0.0)


def plan(**changes: object) -> Plan:
    settings = TrainSettings.model_validate(
        {"num_layers": 2, "rank": 4, "batch_size": 4, "frozen_prefix": "never", **changes}
    )
    return Plan(settings, TINY, ROWS, ROWS)


def peak(**changes: object) -> int:
    return plan(**changes).estimate().phases["training"].bytes


def steps_of_layers(x: mx.array, **weights: mx.array) -> list[mx.array]:
    def loss(*weights: mx.array) -> mx.array:
        hidden = x
        for weight in weights:
            hidden = hidden + mx.tanh(hidden @ weight) * mx.sigmoid(hidden)
        return mx.sum(hidden * hidden)

    value, gradient = mx.value_and_grad(loss, argnums=list(range(len(weights))))(*weights.values())
    return [value, *gradient]


@pytest.mark.skipif(on_gpu(), reason="the pace is that of the CPU backend")
@pytest.mark.compiled
@pytest.mark.parametrize("compiled", [False, True])
def test_the_replay_of_a_gradient_is_the_memory_that_mlx_takes_for_it(compiled: bool) -> None:
    arrays = {"x": mx.ones((3000, 768)), **{f"w{place}": mx.ones((768, 768)) for place in range(8)}}
    graph = graph_of(steps_of_layers, arrays)
    replayed = highest(fused(graph) if compiled else graph, CPU, lambda value: "all", list(arrays))
    mx.eval(arrays)
    held = mx.get_active_memory() - sum(array.nbytes for array in arrays.values())  # of other tests
    compute: Callable[..., Any] = mx.compile(steps_of_layers) if compiled else steps_of_layers
    mx.eval(compute(**arrays))  # the first time it is compiled, and waits for that
    mx.reset_peak_memory()
    mx.eval(compute(**arrays))
    assert replayed.bytes == pytest.approx(mx.get_peak_memory() - held, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [{"num_layers": -1}, {"num_layers": 2, "grad_checkpoint": True, "accumulation_steps": 2}],
)
def test_a_training_takes_what_was_predicted_of_it(settings: dict[str, Any]) -> None:
    """In a process of its own, with a head of several chunks."""
    config = {**CONFIG, "vocab_size": 50_000}
    code = f"""
import tasks
from tasks.config import TrainSettings
from tasks.train.memory import probe
settings = TrainSettings(**{settings!r}, batch_size=2, epochs=2, max_steps=2, frozen_prefix="never")
print(probe.measured_ratio({config!r}, settings, rows=4, length=257))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.05)


@pytest.mark.skipif(on_gpu(), reason="the pace is that of the CPU backend")
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_held_to_a_limit_mlx_takes_what_the_replay_takes_that_is_held_to_it(share: float) -> None:
    arrays = {"x": mx.ones((3000, 768)), **{f"w{place}": mx.ones((768, 768)) for place in range(8)}}
    graph = graph_of(steps_of_layers, arrays)
    free = highest(graph, CPU, lambda value: "all", list(arrays)).bytes
    mx.eval(arrays)
    held = mx.get_active_memory() - sum(array.nbytes for array in arrays.values())
    with holding_back(round(share * free) + held):
        mx.reset_peak_memory()
        mx.eval(steps_of_layers(**arrays))
        peak = mx.get_peak_memory() - held
    limited = replace(CPU, limit_bytes=share * free, crest=1)
    assert highest(graph, limited, lambda value: "all", list(arrays)).bytes == pytest.approx(peak, rel=0.02)
    assert peak < (share + 0.06) * free


def test_beyond_a_limit_the_crest_that_comes_up_often_enough_is_met() -> None:
    """Three times 4 MB and once 40 MB beside what is there, each given back before the next."""

    def crests(x: mx.array) -> list[mx.array]:
        total = mx.zeros(())
        for rows in (1000, 10_000, 1000, 1000):
            [x] = mx.depends([x], [total])
            total = total + mx.sum(mx.cumsum(mx.broadcast_to(x, (rows, 1000)), axis=0))
        return [total]

    graph = graph_of(crests, {"x": mx.zeros((1000,))})

    def met(crest: int, limit_bytes: float = 1e6, dispatches: int = CPU.dispatches) -> float:
        pace = replace(CPU, limit_bytes=limit_bytes, crest=crest, dispatches=dispatches)
        return highest(graph, pace, lambda value: "all", ["x"]).bytes / 1e6

    assert [round(met(crest)) for crest in (1, 2, 3, 4)] == [40, 4, 4, 4]
    assert round(met(2, dispatches=10_000)) == 4, "a task that is not full is waited for too"
    assert met(2, limit_bytes=20e6) == pytest.approx((1 + BEYOND) * 20, rel=1e-3)
    assert met(2, limit_bytes=1e9) == met(1, limit_bytes=math.inf)


def names(function: Callable[..., Sequence[mx.array]], compile_too: bool = False) -> list[str]:
    graph = graph_of(function, {"x": mx.zeros((4, 8))})
    return [each.name for each in (fused(graph) if compile_too else graph).operations]


def test_elementwise_operations_become_one_and_others_do_not() -> None:
    assert names(lambda x: [mx.exp(mx.sin(x)) * 2.0], compile_too=True) == ["Compiled"]
    assert names(lambda x: [mx.exp(mx.cumsum(mx.sin(x)))], compile_too=True).count("Compiled") == 0


def test_what_stands_in_has_the_operations_of_one_function_and_the_gradient_of_another() -> None:
    def forward(x: mx.array) -> mx.array:
        return mx.sum(instead_of(mx.exp(x), mx.tan(x)))

    assert "Exp" in names(lambda x: [forward(x)])
    assert "Tan" not in names(lambda x: [forward(x)])
    backward = names(lambda x: [mx.grad(forward)(x)])
    assert "Cos" in backward
    assert "Exp" not in backward


@pytest.mark.parametrize("kind", TRACED)
def test_every_architecture_is_estimated_from_its_config_alone(kind: str) -> None:
    config = {**COMMON, "model_type": kind, **CONFIGS[kind]}
    found = estimate_from_config(TrainSettings(num_layers=2, batch_size=2), config, ROWS)
    training = found.phases["training"]
    assert min(training.weights, training.adapters, training.optimizer, training.activations) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "full", "num_layers": -1},
        {"method": "dora"},
        {"method": "soft-prompt"},
        {"accumulation_steps": 2},
        {"grad_checkpoint": True},
        *({"optimizer": name} for name in ("adam", "sgd", "lion", "adafactor", "muon")),
    ],
)
def test_every_way_of_training_is_estimated(settings: dict[str, object]) -> None:
    assert peak(**settings) > 0


def test_optimizer_states_are_counted_exactly() -> None:
    network = outline(TINY)
    add_adapter(network, adapter_config(TrainSettings(num_layers=2, rank=4), 4), seed=0)
    parameters = count_parameters(adapter_weights(network))
    for name, states in (("adamw", 2), ("sgd", 1)):
        counted = plan(optimizer=name).estimate().phases["validation"].optimizer
        assert counted == pytest.approx(4 * states * parameters, abs=64)


@pytest.mark.parametrize("larger", [{"num_layers": -1}, {"rank": 64}, {"batch_size": 8}])
def test_more_layers_rank_and_rows_cost_more(larger: dict[str, object]) -> None:
    assert peak(**larger) > peak()


def test_layers_below_the_injection_are_no_longer_in_memory() -> None:
    freed = plan(frozen_prefix="always").estimate().phases["training"].weights
    assert freed < plan(frozen_prefix="never").estimate().phases["training"].weights


def test_prepared_rows_and_their_sizes_give_the_same(tiny_model: ModelFolder, data: StepOutput) -> None:
    settings = TrainSettings(num_layers=2, rank=4, batch_size=2, epochs=2)
    assert estimate_memory(settings, tiny_model, data).peak_bytes > 0


def test_a_plan_over_budget_is_changed_in_the_order_that_costs_least() -> None:
    deep = plan(num_layers=-1, batch_size=4, rank=64)
    shallow = deep.with_settings(grad_checkpoint=True, batch_size=1, accumulation_steps=4, num_layers=1)
    budget = shallow.estimate().peak_bytes
    changes = nearest_that_fits(deep, budget)
    assert changes is not None
    assert changes[-1].plan.estimate().peak_bytes == changes[-1].peak_bytes <= budget
    given = [override.partition("=")[0] for change in changes for override in change.overrides]
    order = ["train.grad_checkpoint", "train.batch_size", "train.num_layers", "train.rank"]
    places = [order.index(name) for name in given if name in order]
    assert places == sorted(places)
    assert places


def test_what_cannot_fit_is_said_and_what_fits_is_left_alone() -> None:
    assert nearest_that_fits(plan(batch_size=1, rank=4, num_layers=1), 1000) is None
    assert nearest_that_fits(plan(), 10**12) == []


@pytest.mark.slow
def test_the_largest_that_fits_fits_and_the_next_does_not() -> None:
    budget = plan(batch_size=8).estimate().peak_bytes
    found = {each.setting: each for each in what_fits(plan(), budget, layers=4)}
    assert found["train.batch_size"].plain == 8


QUANTISED = {"quantization": {"bits": 4, "group_size": 64}}


@pytest.mark.parametrize(
    ("gpu", "settings", "config", "expected"),
    [
        (False, {}, {"dtype": "bfloat16"}, [None]),
        (True, {}, {"dtype": "bfloat16"}, [16, 8, 4]),
        (True, {}, {"dtype": "float32"}, [32, 8, 4]),
        (True, {}, QUANTISED, [None]),
        (True, {"method": "full"}, {"dtype": "bfloat16"}, [None]),
    ],
)
def test_a_base_is_told_of_in_the_bits_that_it_may_have_here(
    gpu: bool,
    settings: dict[str, object],
    config: dict[str, object],
    expected: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "on_gpu", lambda: gpu)
    found = bases(replace(plan(**settings), config={**TINY, **config}))
    assert [*found] == expected
    for bits in {8, 4} & found.keys():
        assert found[bits].config["quantization"]["bits"] == bits


def test_more_fits_on_a_base_of_fewer_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of 16, 8 and 4 bits: a part for the weights, one for each row."""

    def estimate(self: Plan) -> MemoryEstimate:
        bits = self.config.get("quantization", {}).get("bits", 16)
        rows = self.settings.batch_size // (2 if self.settings.grad_checkpoint else 1)
        return MemoryEstimate({"training": Breakdown(weights=bits, activations=rows)})

    monkeypatch.setattr(fitting, "on_gpu", lambda: True)
    monkeypatch.setattr(Plan, "estimate", estimate)
    found = [each for each in what_fits(plan(), 20, layers=4) if each.setting == "train.batch_size"]
    assert [(each.bits, each.plain, each.checkpointed) for each in found] == [
        (16, 4, 8),
        (8, 8, 16),
        (4, 16, 32),
    ]


def test_a_run_over_its_budget_is_refused_with_parts_and_settings_that_fit(
    tiny_model: ModelFolder, data: StepOutput
) -> None:
    settings = TrainSettings(num_layers=-1, batch_size=8, budget="1MB")
    with pytest.raises(InputError, match=r"train\.budget = 1MB.*MB while .*weights"):
        within_budget(settings, tiny_model, data)
    kept, allowed = within_budget(settings.model_copy(update={"budget": "8GB"}), tiny_model, data)
    assert kept.num_layers == -1
    assert allowed.budget_bytes == 8 * 10**9


def test_a_run_over_its_budget_is_adapted_when_asked_for(tiny_model: ModelFolder, data: StepOutput) -> None:
    settings = TrainSettings(num_layers=-1, batch_size=8, rank=64, adapt=True)
    _, allowed = within_budget(settings.model_copy(update={"num_layers": 1}), tiny_model, data)
    assert allowed.estimate is not None
    budget = f"{allowed.estimate.peak_bytes / 1e6 + 0.01:.3f}MB"
    adapted, allowed = within_budget(settings.model_copy(update={"budget": budget}), tiny_model, data)
    assert adapted.grad_checkpoint
    assert allowed.estimate is not None
    assert allowed.estimate.peak_bytes <= allowed.budget_bytes


def test_measured_runs_calibrate_and_outliers_do_not() -> None:
    replayed = Breakdown(weights=1000, activations=10_000)
    estimate = MemoryEstimate({"training": replayed})
    for measured in (12_000, 12_000):
        learn(estimate, measured)
    assert calibration() == Calibration()
    for measured in (12_000, 50_000, 2_000, 12_000):
        learn(estimate, measured)
    assert calibration().ratio == pytest.approx(1.1)
    assert calibration().applied(replayed).bytes == 12_000
    assert set(CHANGING) < set(replayed.parts())


def test_this_machine_is_measured_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [file] = (home / "cache" / "memory").glob("*.probe.json")
    file.unlink()
    calibrate_once()
    [ratio] = json.loads(file.read_text())
    assert ratio == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(sys, "executable", "nothing that runs")
    calibrate_once()
    assert json.loads(file.read_text()) == [ratio]


def test_a_machine_that_cannot_be_measured_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [file] = (home / "cache" / "memory").glob("*.probe.json")
    file.unlink()
    monkeypatch.setattr(sys, "executable", "nothing that runs")
    calibrate_once()
    assert "could not be measured" in caplog.text
    assert json.loads(file.read_text()) == [1.0]


def test_of_a_probe_that_fails_the_reason_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [file] = (home / "cache" / "memory").glob("*.probe.json")
    file.unlink()
    monkeypatch.setattr(probe, "__name__", "no.such.module")
    calibrate_once()
    assert "(ModuleNotFoundError: No module named 'no')" in caplog.text


def test_on_a_gpu_a_run_is_predicted_as_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    free = plan().estimate()
    assert free.limit_bytes is None
    monkeypatch.setattr(estimating, "on_gpu", lambda: True)
    held = plan().estimate()
    assert held.limit_bytes is not None
    assert held.limit_bytes < held.peak_bytes < free.peak_bytes


def test_the_first_look_is_at_no_more_rows_than_a_batch_has() -> None:
    one, two, more = (
        plan(batch_size=rows).estimate().phases["first look"].bytes for rows in (1, LOOKED_AT, 2 * LOOKED_AT)
    )
    assert one < two == more


def test_a_probe_counts_until_there_are_runs_and_raises_only() -> None:
    note_probe(0.9)
    assert calibration() == Calibration()
    note_probe(1.2)
    assert calibration() == Calibration(1.2)
    for _ in range(3):
        learn(MemoryEstimate({"training": Breakdown(activations=1000)}), 1050)
    assert calibration().ratio == pytest.approx(1.05)


def test_a_damaged_calibration_counts_for_none(home: Path) -> None:
    for _ in range(3):
        learn(MemoryEstimate({"training": Breakdown(activations=1000)}), 1100)
    [file] = (home / "cache" / "memory").glob("????????????????.json")
    assert len(json.loads(file.read_text())) == 3
    file.write_text("[1.1, ")
    assert calibration() == Calibration()


def test_mlx_is_held_to_the_least_of_budget_share_and_prediction() -> None:
    predicted = MemoryEstimate({}, limit_bytes=300)
    assert Allowed(1000).limit_bytes == 1000
    assert Allowed(1000, MemoryEstimate({})).limit_bytes == 1000
    assert Allowed(1000, predicted).limit_bytes == 300
    assert Allowed(1000, predicted, share_bytes=200).limit_bytes == 200
    assert Allowed(100, predicted, share_bytes=200).limit_bytes == 100


def test_a_breakdown_is_told_largest_first() -> None:
    assert in_words(Breakdown(weights=10**9, logits=2 * 10**9)) == "logits 2.00 GB, weights 1.00 GB"


@pytest.mark.parametrize("prefix", ["always", "never"])
def test_of_many_layers_that_are_alike_a_few_are_traced(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = replace(plan(frozen_prefix=prefix), config={**TINY, "num_hidden_layers": 20})
    monkeypatch.setattr(estimating, "layers_in_sight", lambda ahead: 9)
    short = deep.estimate()
    monkeypatch.setattr(estimating, "layers_in_sight", lambda ahead: 100)
    whole = deep.estimate()
    for name in ("training", "validation"):
        assert short.phases[name].parts() == whole.phases[name].parts()
    for name, parts in whole.phases.items():
        assert short.phases[name].bytes == pytest.approx(parts.bytes, rel=0.01)


def test_layers_that_differ_are_all_traced() -> None:
    network = skeleton(
        {**COMMON, "model_type": "gemma3_text", **CONFIGS["gemma3_text"], "num_hidden_layers": 12}
    )
    assert leave_out(network, 12, kept=4) == []
    alike = skeleton({**TINY, "num_hidden_layers": 12})
    assert len(leave_out(alike, 12, kept=4)) == 8


def test_a_base_that_stays_in_memory_costs_its_frozen_layers() -> None:
    freed = plan(frozen_prefix="always", num_layers=1)
    stays = replace(freed, prefixed=Prefixed(train=True, valid=True, base_stays=True))
    before, after = freed.estimate().phases["training"], stays.estimate().phases["training"]
    network = skeleton(TINY)
    layers = [sum(array.nbytes for _, array in flat(layer.parameters())) for layer in network.layers]
    assert after.weights - before.weights == sum(layers[:-1])
    assert after.bytes - before.bytes == sum(layers[:-1])
