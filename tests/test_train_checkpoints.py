"""A training stopped and resumed equals one that was never stopped; damage is passed over and said."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from test_train_loop import tiny_network

from tasks import publish
from tasks.config import TrainSettings
from tasks.errors import StepError
from tasks.prepare.splits import TokenRows
from tasks.train import checkpoints as module
from tasks.train.checkpoints import (
    BEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    SUMS_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    owned,
)
from tasks.train.loop import fit
from tasks.train.state import Training

METHODS, OPTIMIZERS = (
    get_args(TrainSettings.model_fields[name].annotation) for name in ("method", "optimizer")
)
EXACT = ("train_loss", "val_loss", "grad_norm", "learning_rate", "trained_tokens", "epoch")


class PowerCutError(Exception):
    """What stops a training of these tests."""


def settings_of(**changes: object) -> TrainSettings:
    given = {
        "num_layers": 2,
        "rank": 4,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "epochs": 99,
        "max_steps": 16,
    }
    return TrainSettings.model_validate({**given, "steps_per_eval": 5, "steps_per_save": 1, **changes})


def train(
    folder: Path, rows: TokenRows, settings: TrainSettings, power_cut_after: int | None = None
) -> tuple[Training, list[tuple[int, dict[str, float]]]]:
    """Train, with a power cut in the middle of the step after `power_cut_after`; what was reported too."""
    reported = []

    def report(step: int, metrics: Mapping[str, float]) -> None:
        reported.append((step, dict(metrics)))
        if power_cut_after is not None and step > power_cut_after:
            raise PowerCutError

    network = tiny_network(settings)
    return fit(network, rows, rows, settings, report, Checkpoints(folder, settings)), reported


def cut(folder: Path, rows: TokenRows, settings: TrainSettings, after: int) -> None:
    with pytest.raises(PowerCutError):
        train(folder, rows, settings, power_cut_after=after)


def exact(history: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """The history without what a clock measured."""
    return [(step, {name: metrics[name] for name in EXACT if name in metrics}) for step, metrics in history]


def digests(folder: Path, step: int = 16) -> dict[str, str]:
    files = (folder / f"step-{step:08d}").glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_equal_runs(
    left: Training, right: Training, left_folder: Path, right_folder: Path, step: int = 16
) -> None:
    assert exact(left.history) == exact(right.history)
    assert (left.best_step, left.best_val_loss) == (right.best_step, right.best_val_loss)
    assert left.best_weights.keys() == right.best_weights.keys()
    for name, array in left.best_weights.items():
        assert np.array_equal(np.array(array), np.array(right.best_weights[name])), name
    assert digests(left_folder, step) == digests(right_folder, step)
    assert {WEIGHTS_FILE, OPTIMIZER_FILE} <= digests(left_folder, step).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation_steps": 3},
        {"dropout": 0.3},
        {"accumulation_steps": 2, "dropout": 0.2, "steps_per_eval": 8},
        {"steps_per_eval": 3, "learning_rate": 0.3},
        {"steps_per_save": 5, "max_grad_norm": None},
        {"grad_checkpoint": True, "dropout": 0.2},
        {"optimizer": "muon", "lora_plus_ratio": 16.0, "learning_rate": 1e-3},
        {"optimizer": "adafactor", "weight_decay": 0.1},
        *(
            pytest.param(
                {"method": method, "optimizer": optimizer},
                marks=() if method == "lora" or optimizer == "adamw" else pytest.mark.slow,
            )
            for method in METHODS
            for optimizer in OPTIMIZERS
        ),
    ],
    ids=lambda changes: ",".join(map(str, changes.items())) or "plain",
)
def test_eight_and_eight_resumed_steps_equal_sixteen_straight_ones_byte_for_byte(
    changes: dict[str, object], token_rows: TokenRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(**changes)
    # Thirteen rows are four batches an epoch: both halves cross borders of epochs and validations.
    straight, _ = train(tmp_path / "straight", token_rows, settings)
    cut(tmp_path / "resumed", token_rows, settings, after=8)
    resumed, _ = train(tmp_path / "resumed", token_rows, settings)
    assert "damaged" not in caplog.text
    last = 15 if "steps_per_save" in changes else 16
    assert_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "resumed", last)


def test_a_run_cut_at_every_step_equals_one_that_was_never_cut(token_rows: TokenRows, tmp_path: Path) -> None:
    settings = settings_of(dropout=0.1, accumulation_steps=2, steps_per_eval=4)
    straight, _ = train(tmp_path / "straight", token_rows, settings)
    for step in range(1, 16):
        cut(tmp_path / "resumed", token_rows, settings, after=step)
    resumed, _ = train(tmp_path / "resumed", token_rows, settings)
    assert_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "resumed")


def test_a_resumed_run_reports_every_point_once_and_says_where_it_goes_on(
    token_rows: TokenRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of()
    cut(tmp_path, token_rows, settings, after=8)
    with caplog.at_level(logging.INFO):
        resumed, reported = train(tmp_path, token_rows, settings)
    assert f"resuming at step 8 of 16 from {tmp_path / 'step-00000008'}" in caplog.text
    points = [(step, name) for step, metrics in reported for name in metrics]
    assert len(points) == len(set(points))
    assert [step for step, name in points if name == "train_loss"] == list(range(1, 17))
    assert [step for step, name in points if name == "val_loss"] == [0, 5, 10, 15, 16]
    assert resumed.step == 16


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, OPTIMIZER_FILE, BEST_FILE, STATE_FILE, SUMS_FILE])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    name: str, damage: Any, token_rows: TokenRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(max_steps=8, steps_per_eval=3)
    straight, _ = train(tmp_path / "straight", token_rows, settings)
    cut(tmp_path / "run", token_rows, settings, after=5)
    newest = tmp_path / "run" / "step-00000005"
    damage(newest / name)
    resumed, _ = train(tmp_path / "run", token_rows, settings)
    assert f"{newest} is damaged and passed over" in caplog.text
    assert_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "run", 8)


def test_with_every_checkpoint_damaged_training_starts_again(token_rows: TokenRows, tmp_path: Path) -> None:
    settings = settings_of(max_steps=6)
    straight, _ = train(tmp_path / "straight", token_rows, settings)
    cut(tmp_path / "run", token_rows, settings, after=4)
    for path in (tmp_path / "run").glob("step-*"):
        truncate(path / WEIGHTS_FILE)
    resumed, _ = train(tmp_path / "run", token_rows, settings)
    assert_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "run", 6)


def test_the_last_three_stay_and_each_holds_the_best_adapter(token_rows: TokenRows, tmp_path: Path) -> None:
    settings = settings_of(steps_per_eval=2)
    others = TokenRows(token_rows.tokens[::-1].copy(), token_rows.offsets, token_rows.supervised)
    network, kept = tiny_network(settings), Checkpoints(tmp_path, settings)
    result = fit(network, token_rows, others, settings, lambda *_: None, kept)
    assert result.best_step < 14, "the best has to be older than the last three for this test"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000014", "step-00000015", "step-00000016",
    ]  # fmt: skip
    for path in tmp_path.iterdir():
        best: dict[str, mx.array] = mx.load(str(path / BEST_FILE))  # type: ignore[assignment]
        assert all(np.array_equal(np.array(best[n]), np.array(a)) for n, a in result.best_weights.items())


def test_damaged_checkpoints_do_not_count_among_the_three(token_rows: TokenRows, tmp_path: Path) -> None:
    settings = settings_of(max_steps=9)
    cut(tmp_path, token_rows, settings, after=6)
    for step in (5, 6):
        truncate(tmp_path / f"step-{step:08d}" / STATE_FILE)
    cut(tmp_path, token_rows, settings, after=5)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, True), (60.0, False)])
def test_minutes_per_save_alone_saves_too(
    minutes: float, saved: bool, token_rows: TokenRows, tmp_path: Path
) -> None:
    train(tmp_path, token_rows, settings_of(steps_per_save=None, minutes_per_save=minutes, max_steps=2))
    assert (tmp_path / "step-00000001").is_dir() is saved


def test_steps_per_save_saves_at_its_multiples_only(token_rows: TokenRows, tmp_path: Path) -> None:
    train(tmp_path, token_rows, settings_of(steps_per_save=3, max_steps=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


def test_a_checkpoint_of_other_settings_is_refused(token_rows: TokenRows, tmp_path: Path) -> None:
    cut(tmp_path, token_rows, settings_of(), after=4)
    for change in ({"seed": 1}, {"accumulation_steps": 2}, {"num_layers": 1}):
        with pytest.raises(StepError, match="step-00000004 is the checkpoint of a training with other"):
            train(tmp_path, token_rows, settings_of(**change))


def test_a_step_that_is_not_finite_leaves_the_last_finite_checkpoint(
    token_rows: TokenRows, tmp_path: Path
) -> None:
    settings = settings_of()
    network = tiny_network(settings)

    def spoil(step: int, metrics: Mapping[str, float]) -> None:
        if step == 6:
            network.model.layers[3].mlp.down_proj.linear.weight[0, 0] = float("nan")

    with pytest.raises(StepError, match="step 7: loss nan"):
        fit(network, token_rows, token_rows, settings, spoil, Checkpoints(tmp_path, settings))
    found = Checkpoints(tmp_path, settings).newest()
    assert found is not None
    assert found.training.step == 6
    assert all(mx.isfinite(array).all() for array in found.weights.values())


def test_each_file_is_synced_before_the_rename_and_the_parent_after(
    token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename, sync = os.rename, publish.sync
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), done.append("rename"))[0])
    monkeypatch.setattr(publish, "sync", lambda path: (sync(path), done.append(Path(path).name))[0])
    train(tmp_path / "run", token_rows, settings_of(max_steps=1))
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert {WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE} <= set(before)
    assert before[-1].startswith(".step-00000001."), "the folder itself, after its files"
    assert after == ["run"]


def test_half_removed_and_half_written_checkpoints_are_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in (".step-00000003.0a1b2c3d.draft", ".step-00000001.old.draft"):
        (folder / name).mkdir(parents=True)
        (folder / name / WEIGHTS_FILE).write_text("half")
    (folder / "step-00000002").mkdir()
    with owned(folder, "me"):
        assert sorted(path.name for path in folder.iterdir()) == ["owner.json", "step-00000002"]


def test_an_empty_folder_does_not_stay(tmp_path: Path) -> None:
    with owned(tmp_path / "run", "me"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def hold(folder: str, held: Any, go_on: Any) -> None:
    with owned(Path(folder), "MLflow run 4711"):
        held.set()
        go_on.wait(60)
        (Path(folder) / "finished").touch()


def test_a_second_process_says_who_trains_and_waits_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    held, go_on = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path / "run"), held, go_on))
    other.start()
    assert held.wait(60)

    def wait_for(title: str) -> Any:
        assert not (tmp_path / "run" / "finished").exists()
        go_on.set()
        return progress(title)

    progress = module.progress
    monkeypatch.setattr(module, "progress", wait_for)
    with owned(tmp_path / "run", "me"):
        assert (tmp_path / "run" / "finished").exists()
    other.join()
    assert f"MLflow run 4711 (process {other.pid} on " in caplog.text
    assert "is training this very adapter: waiting" in caplog.text


def test_the_files_of_a_checkpoint_pass_sha256sum(token_rows: TokenRows, tmp_path: Path) -> None:
    train(tmp_path, token_rows, settings_of(max_steps=1))
    folder = tmp_path / "step-00000001"
    listed = dict(line.split("  ")[::-1] for line in (folder / SUMS_FILE).read_text().splitlines())
    assert listed.keys() == {path.name for path in folder.iterdir()} - {SUMS_FILE}
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_step_that_is_saved_is_not_written_again(
    token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(max_steps=2)
    train(tmp_path, token_rows, settings)
    kept = Checkpoints(tmp_path, settings)
    found = kept.newest()
    assert found is not None
    monkeypatch.setattr(module, "publishing", None)
    assert kept.save(found.training, found.weights, found.optimizer) == found.path


def test_equal_arrays_give_equal_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    arrays = {name: mx.full((5,), place) for place, name in enumerate("hgfedcba")}
    settings, state = settings_of(), Training(16, 0, 4, 1, step=1)
    for folder, given in ("one", arrays), ("other", dict(reversed(arrays.items()))):
        Checkpoints(tmp_path / folder, settings).save(state, given, given)
    assert digests(tmp_path / "one", 1) == digests(tmp_path / "other", 1)


def test_what_was_checked_is_what_is_used_even_if_the_file_changes_then(
    token_rows: TokenRows, tmp_path: Path
) -> None:
    settings = settings_of(max_steps=6)
    train(tmp_path, token_rows, settings)
    found = Checkpoints(tmp_path, settings).newest()
    assert found is not None
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE, BEST_FILE):
        (found.path / name).write_bytes(b"")
    for arrays in (found.weights, found.optimizer, found.training.best_weights):
        assert arrays
        assert all(np.isfinite(np.array(array)).all() for array in arrays.values())
