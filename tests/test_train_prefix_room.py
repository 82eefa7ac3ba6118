"""Caches give way to new ones, none that is at work or wanted does, and nothing dead stays on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tasks.progress import Bar, show_progress_on
from tasks.train.prefix_room import building, make_room, prefix_folder

SIZE = 1000


def cache(name: str, used: float, size: int = SIZE) -> Path:
    path = prefix_folder() / name
    path.mkdir()
    (path / "hidden").write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


def names() -> set[str]:
    return {path.name for path in prefix_folder().iterdir() if path.is_dir()}


def test_the_least_recently_used_give_way_and_no_more_than_needed() -> None:
    for name, used in (("b", 20), ("a", 10), ("c", 30)):
        cache(name, used)
    make_room(SIZE, 3 * SIZE)
    assert names() == {"b", "c"}
    make_room(SIZE, 3 * SIZE)
    assert names() == {"b", "c"}


def test_one_that_is_wanted_stays() -> None:
    oldest, _ = cache("a", 10), cache("b", 20)
    make_room(SIZE, 2 * SIZE, keep={oldest})
    assert names() == {"a"}


def test_one_that_a_process_is_at_work_on_stays() -> None:
    oldest, _ = cache("a", 10), cache("b", 20)
    with FileLock(f"{oldest}.lock"):
        make_room(SIZE, 2 * SIZE)
        assert names() == {"a"}


def test_where_removing_would_not_suffice_nothing_is_removed() -> None:
    kept, _ = cache("a", 10), cache("b", 20)
    with pytest.raises(OSError, match=r"2e-06 GB are needed, train\.prefix_cache_gb is 2e-06"):
        make_room(2 * SIZE, 2 * SIZE, keep={kept})
    assert names() == {"a", "b"}


def test_a_full_disk_is_emptied_of_caches_and_refused_when_that_is_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def usage(path: Path) -> object:
        return shutil._ntuple_diskusage(10 * SIZE, 10 * SIZE - free, free)

    monkeypatch.setattr("tasks.train.prefix_room.shutil.disk_usage", usage)
    cache("a", 10)
    cache("b", 20)
    free = SIZE
    with pytest.raises(OSError, match=r"on the disk of .* are free"):
        make_room(4 * SIZE, 100 * SIZE)
    assert names() == {"a", "b"}
    make_room(SIZE, 100 * SIZE)  # a cache takes nine tenths of what is free
    assert names() == {"b"}


def test_what_is_being_built_counts_and_stays() -> None:
    draft = cache(".key.12345678.draft", 5)
    with FileLock(prefix_folder() / "key.lock"):
        cache("a", 10)
        make_room(SIZE, 2 * SIZE)
        assert names() == {draft.name}


def test_what_a_killed_process_left_goes_whoever_asks_for_room() -> None:
    cache(".key.12345678.draft", 5)
    cache("a", 10)
    make_room(SIZE, 2 * SIZE)
    assert names() == {"a"}


def test_a_builder_clears_what_killed_builders_left() -> None:
    mine, other = cache(".a.12345678.draft", 5), cache(".b.12345678.draft", 5)
    with building([prefix_folder() / "a"], "frozen layers"):
        assert not mine.exists()
        assert other.exists()


def test_a_second_builder_waits_for_the_first_and_shows_it() -> None:
    first = FileLock(prefix_folder() / "a.lock")
    shown = []

    class Watcher:
        @contextmanager
        def bar(self, title: str, total: float | None) -> Iterator[Bar]:
            shown.append(title)
            yield self

        def advance(self, amount: float = 1, note: str = "") -> None:
            first.release()  # as the first builder does, once this one waits

    first.acquire()
    show_progress_on(Watcher())
    try:
        with building([prefix_folder() / "a"], "frozen layers, train"):
            assert not first.is_locked
    finally:
        show_progress_on(None)
    assert shown == ["waiting for frozen layers, train of another process"]
