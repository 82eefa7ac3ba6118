"""A trial that pauses and goes on, on a base kept in memory, is the training of its settings alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FAMILIES, tiny_network
from mlx.utils import tree_flatten

from search.worker import _failed
from tasks.config import TrainSettings
from tasks.models.cpu_functions import use_fast_functions
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import TokenRows, save_splits
from tasks.publish import StepOutput
from tasks.tracking import Run
from tasks.train import trial as trial_module
from tasks.train.memory.budget import Allowed
from tasks.train.memory_guard import OverBudget
from tasks.train.step import train_adapter
from tasks.train.trial import Reached, WarmBase, drop_trial, train_trial
from tasks.train.trial_prefixes import record_for_trials

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"num_layers": 2, "dropout": 0.1, "frozen_prefix": "always"},
    "dora": {"method": "dora", "num_layers": 1, "frozen_prefix": "never"},
    "full": {"method": "full", "num_layers": 2, "frozen_prefix": "never", "learning_rate": 1e-3},
    "soft prompt": {"method": "soft-prompt", "prompt_tokens": 3},
    "recomputed": {"num_layers": -1, "grad_checkpoint": True},
}


@pytest.fixture
def data(token_rows: TokenRows, tmp_path: Path) -> StepOutput:
    """The same thirteen rows for everything."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    save_splits(folder, dict.fromkeys(("train", "valid", "test"), token_rows))
    return StepOutput(folder, "prepared", False, 0.0)


@pytest.fixture
def base(tiny_model: ModelFolder) -> WarmBase:
    return WarmBase(tiny_model)


class Unrecorded(Run):
    """A run that nothing is written to."""

    def __init__(self) -> None:
        super().__init__("none", "", "")

    def report(self, *_: Any) -> None: ...
    def tag(self, name: str) -> None: ...  # type: ignore[override]
    def set_tags(self, *_: Any) -> None: ...
    def log_files(self, *_: Any, **__: Any) -> None: ...


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "num_layers": 2,
            "rank": 4,
            "learning_rate": 1e-2,
            "epochs": 3,
            "steps_per_eval": 3,
            "minutes_per_save": 99,
            **changes,
        }
    )


def nobody(step: int, metrics: object) -> None:
    pass


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest()


def in_another_home(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))


def paused_twice(wanted: TrainSettings, base: WarmBase, data: StepOutput) -> Reached:
    first = train_trial(wanted, base, data, nobody, until_step=3)
    assert (first.step, first.ended_by, first.adapter) == (3, "", None)
    second = train_trial(wanted, base, data, nobody, until_step=9)
    assert second.step == 9
    return train_trial(wanted, base, data, nobody, until_step=None)


@pytest.mark.parametrize(
    "method",
    [
        each if each in ("lora", "recomputed") else pytest.param(each, marks=pytest.mark.slow)
        for each in METHODS
    ],
)
def test_paused_twice_and_after_another_trial_it_equals_the_finetune(
    method: str, base: WarmBase, data: StepOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(**METHODS[method])
    alone = train_adapter(wanted, base.model, data, Unrecorded())
    curve = alone.read_json("training.json")
    in_another_home(monkeypatch, tmp_path / "search")
    train_trial(settings(num_layers=3, learning_rate=3e-2, max_steps=3), base, data, nobody, None)
    reached = paused_twice(wanted, base, data)
    assert reached.adapter is not None
    assert reached.adapter != alone.path
    assert digest(reached.adapter) == digest(alone.path)
    found = json.loads((reached.adapter / "training.json").read_text())
    for name in ("train_loss", "val_loss", "learning_rate", "grad_norm"):
        assert values(found, name) == values(curve, name)
    assert reached.ended_by == curve["ended_by"]
    assert [loss for _, loss in reached.val_losses] == [loss for _, loss in values(curve, "val_loss")[1:]]


def values(training: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return [(step, metrics[name]) for step, metrics in training["history"] if name in metrics]


def test_a_finished_trial_is_found_by_the_finetune_of_its_settings(base: WarmBase, data: StepOutput) -> None:
    reached = train_trial(settings(), base, data, nobody, None)
    assert train_adapter(settings(), base.model, data, Unrecorded()).reused
    again = train_trial(settings(), base, data, nobody, None)
    assert again == reached


def test_a_paused_trial_is_gone_on_with_by_the_finetune_of_its_settings(
    base: WarmBase, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_trial(settings(), base, data, nobody, until_step=6)
    launched: list[int] = []
    from tasks.train.update import Updates

    plain = Updates.launch
    monkeypatch.setattr(Updates, "launch", lambda *given: (launched.append(given[2]), plain(*given))[1])
    train_adapter(settings(), base.model, data, Unrecorded())
    assert launched[0] == 7


def test_a_pause_needs_a_validation_where_it_is(base: WarmBase, data: StepOutput) -> None:
    with pytest.raises(ValueError, match="pause at step 4"):
        train_trial(settings(), base, data, nobody, until_step=4)


def test_patience_ends_a_trial_before_its_rung_as_it_ends_a_finetune(
    base: WarmBase, data: StepOutput
) -> None:
    wanted = settings(learning_rate=0.5, patience=1, epochs=20)
    reached = train_trial(wanted, base, data, nobody, until_step=39)
    assert reached.ended_by == "patience"
    assert reached.step < 39
    assert reached.adapter is not None


def test_nothing_a_trial_does_reaches_the_base(base: WarmBase, data: StepOutput) -> None:
    before = dict(tree_flatten(base.network.parameters()))
    kinds = [(name, type(module)) for name, module in base.network.named_modules()]
    bytes_before = {name: bytes(memoryview(mx.array(array))) for name, array in before.items()}
    for method in METHODS.values():
        train_trial(settings(**{**method, "max_steps": 3}), base, data, nobody, None)
    after = dict(tree_flatten(base.network.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is array for name, array in before.items())
    assert {name: bytes(memoryview(array)) for name, array in after.items()} == bytes_before
    assert [(name, type(module)) for name, module in base.network.named_modules()] == kinds
    assert not base.network.training


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("bits", [None, 4])
def test_a_twin_shares_every_weight_and_no_module(kind: str, bits: int | None, base: WarmBase) -> None:
    base.network = tiny_network(kind, bits)
    use_fast_functions(base.network)
    twin = base.twin()
    theirs = dict(tree_flatten(base.network.parameters()))
    assert all(array is theirs[name] for name, array in tree_flatten(twin.parameters()))
    modules = {id(module) for module in base.network.modules()}
    assert not any(id(module) in modules for module in twin.modules())
    tokens = mx.array([[4, 5, 6, 7]])
    assert mx.array_equal(twin(tokens), base.network(tokens))


def test_the_peak_of_a_trial_is_its_own(base: WarmBase, data: StepOutput) -> None:
    small = settings(max_steps=3, rank=1, num_layers=1)
    alone = train_trial(small, base, data, nobody, None).peak_bytes
    large = train_trial(settings(max_steps=3, rank=512, num_layers=4), base, data, nobody, None).peak_bytes
    after = train_trial(settings(max_steps=3, rank=1, num_layers=1, seed=1), base, data, nobody, None)
    assert large > 1.5 * alone
    assert after.peak_bytes < 1.2 * alone


def test_a_trial_reads_the_prefix_that_was_recorded_for_all(
    base: WarmBase, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.train import prefix_cache

    wanted = settings(frozen_prefix="always", num_layers=2, max_steps=3)
    record_for_trials(wanted, base.model, data, [1, 2], base.network)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(prefix_cache, "_build", refuse)
    train_trial(wanted, base, data, nobody, None)
    train_trial(wanted.model_copy(update={"num_layers": 1}), base, data, nobody, None)


def test_a_dropped_trial_leaves_no_checkpoint(base: WarmBase, data: StepOutput, home: Path) -> None:
    train_trial(settings(), base, data, nobody, until_step=3)
    assert list(home.glob("checkpoints/*/step-*"))
    drop_trial(settings(), base.model, data)
    assert not list(home.glob("checkpoints/*/step-*"))
    drop_trial(settings(), base.model, data)


def test_a_base_that_a_trial_did_change_would_be_noticed(
    base: WarmBase, data: StepOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module.WarmBase, "twin", lambda self: self.network)
    kinds = [type(module) for _, module in base.network.named_modules()]
    train_trial(settings(max_steps=3), base, data, nobody, None)
    assert [type(module) for _, module in base.network.named_modules()] != kinds


def test_a_trial_over_the_memory_it_may_take_is_stopped_and_goes_on_when_it_may_take_more(
    base: WarmBase, data: StepOutput
) -> None:
    with pytest.raises(OverBudget):
        train_trial(settings(), base, data, nobody, None, Allowed(1000))
    assert _failed(OverBudget("5 GB")).kind == "memory", "which makes it infeasible, and not failed"
    stopped = train_trial(settings(), base, data, nobody, None, Allowed(10**12))
    assert stopped.ended_by == "epochs"


def test_a_trial_is_held_to_its_share(base: WarmBase, data: StepOutput) -> None:
    before = mx.get_memory_limit()
    limits: set[int] = set()

    def report(step: int, metrics: Mapping[str, float]) -> None:
        limits.add(mx.get_memory_limit())

    train_trial(settings(max_steps=3), base, data, report, None, Allowed(10**12, share_bytes=10**9))
    assert 10**9 in limits
    assert mx.get_memory_limit() == before
