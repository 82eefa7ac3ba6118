"""A run is meant by its name, its id, or enough of its id."""

from __future__ import annotations

import pytest

from flows import find_run as finding
from flows.find_run import find_run
from tasks.config import TrackingSettings
from tasks.errors import InputError
from tasks.tracking import StoredRun

RUNS = [
    StoredRun("abcde999", "second", "RUNNING", ""),
    StoredRun("abcde111", "sums", "FAILED", ""),
    StoredRun("ffff0000", "sums", "FINISHED", ""),
    StoredRun("eeee0000", "abcd", "FINISHED", ""),
]


@pytest.fixture(autouse=True)
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "stored_runs", lambda tracking: RUNS)


@pytest.mark.parametrize(
    ("reference", "id"),
    [("ffff", "ffff0000"), ("abcde9", "abcde999"), ("sums", "ffff0000"), ("abcd", "eeee0000")],
)
def test_a_name_goes_before_an_id_and_a_finished_run_before_a_newer_failed_one(
    reference: str, id: str
) -> None:
    assert find_run(reference, TrackingSettings()).id == id


def test_an_id_that_may_be_several_is_refused_with_those_it_may_be() -> None:
    with pytest.raises(InputError, match=r"may be any of 2: abcde999 \(second, RUNNING\), abcde111 .*FAILED"):
        find_run("abcde", TrackingSettings())


@pytest.mark.parametrize("reference", ["eee", "", "none"])
def test_a_word_is_not_taken_for_the_beginning_of_an_id(reference: str) -> None:
    with pytest.raises(InputError, match="no run of that id or name in sqlite:"):
        find_run(reference, TrackingSettings())
