"""A step's output is there whole or not at all, and is made once for equal inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import publish
from tasks.publish import fingerprint, publishing, run_step


def test_a_failed_step_leaves_nothing_behind(home: Path) -> None:
    def fail(draft: Path) -> None:
        (draft / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_step("train", {"a": 1}, fail)
    assert list((home / "steps" / "train").iterdir()) == []


def test_equal_inputs_are_made_once_and_other_inputs_anew() -> None:
    made: list[Path] = []
    first = run_step("train", {"a": 1}, made.append)
    again = run_step("train", {"a": 1}, made.append)
    other = run_step("train", {"a": 2}, made.append)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert first.path == again.path != other.path
    assert len(made) == 2


def test_changed_code_of_a_step_does_not_reuse_old_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_step("train", {"a": 1}, lambda draft: None)
    monkeypatch.setattr(publish, "code_version", lambda step: "another version")
    assert not run_step("train", {"a": 1}, lambda draft: None).reused
    assert first.fingerprint != run_step("train", {"a": 1}, lambda draft: None).fingerprint


def test_of_two_that_publish_the_same_the_first_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publishing(target) as draft:
        (draft / "who").write_text("second")
        with publishing(target) as faster:
            (faster / "who").write_text("first")
    assert (target / "who").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
