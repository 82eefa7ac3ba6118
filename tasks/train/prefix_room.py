"""Disk room for the caches of frozen prefixes, and who may write there.

    <cache>/prefix/<key>/                  a cache, whole
    <cache>/prefix/<key>.lock              held by the process that builds or removes it
    <cache>/prefix/.<key>.<random>.draft   one that is being built, or what a killed process left of it

The least recently used caches give way to new ones. One that a process has opened stays readable to it:
its file is mapped.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.home import cache_dir
from tasks.progress import progress
from tasks.publish import remove_drafts

log = logging.getLogger(__name__)

DRAFT = "draft"

LOOK_AGAIN_S = 0.5

DISK_SHARE = 0.9
"""Of what is free on the disk, a cache takes this much at most."""


def prefix_folder() -> Path:
    """Where the caches lie; made when it is not there."""
    folder = cache_dir() / "prefix"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def building(caches: Iterable[Path], title: str) -> Iterator[None]:
    """Hold the locks of some caches, and clear away what killed processes left of them.

    Another process that holds one is computing the very same: this waits for it, and says so.
    """
    with ExitStack() as stack:
        for cache in sorted(caches):  # in one order, or two processes would wait for each other
            stack.enter_context(_held(cache, title))
            remove_drafts(cache.parent, cache.name)
        yield


def make_room(new_bytes: int, limit_bytes: int, keep: Collection[Path] = ()) -> None:
    """Remove the least recently used caches until `new_bytes` more fit under the limit and on the disk.

    What is built at this time counts with its full size. Nothing is removed when that would not suffice.

    Args:
        keep: caches that stay.

    Raises:
        OSError: there is no room, however many are removed.
    """
    folder = prefix_folder()
    _remove_dead_drafts(folder)
    sizes = {path: _size(path) for path in folder.iterdir() if path.is_dir()}
    spare = sorted((path for path in sizes if not _is_draft(path) and path not in keep), key=_last_use)
    total, spared = sum(sizes.values()), sum(sizes[path] for path in spare)
    free = shutil.disk_usage(folder).free
    needed = f"{new_bytes / 1e9:.2g} GB are needed"
    if total - spared + new_bytes > limit_bytes:
        raise OSError(f"{needed}, train.prefix_cache_gb is {limit_bytes / 1e9:g}")
    if new_bytes > DISK_SHARE * (free + spared):
        raise OSError(f"{needed} on the disk of {folder}, {free / 1e9:.2g} GB are free")
    for path in spare:
        if total + new_bytes <= limit_bytes and new_bytes <= DISK_SHARE * free:
            break
        if _remove(path):
            log.info("removed the cached frozen layers %s (%.2g GB)", path.name, sizes[path] / 1e9)
            total, free = total - sizes[path], free + sizes[path]


@contextmanager
def _held(cache: Path, title: str) -> Iterator[None]:
    lock = _lock(cache)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process computes the same, waiting for it (Ctrl-C stops waiting)", title)
        with progress(f"waiting for {title} of another process") as bar:
            while not lock.is_locked:
                with suppress(Timeout):
                    lock.acquire(timeout=LOOK_AGAIN_S)
                bar.advance(LOOK_AGAIN_S)
    try:
        yield
    finally:
        lock.release()


def _remove(cache: Path) -> bool:
    """Remove a cache unless a process is at work on it: renamed first, so that no half of it is found."""
    try:
        with _lock(cache).acquire(timeout=0):
            draft = cache.with_name(f".{cache.name}.{uuid.uuid4().hex[:8]}.{DRAFT}")
            cache.rename(draft)
            shutil.rmtree(draft, ignore_errors=True)
    except (Timeout, FileNotFoundError):
        return False
    return True


def _remove_dead_drafts(folder: Path) -> None:
    """Those of caches that nobody asks for any more, too: else they would lie there for ever."""
    for name in {path.name.split(".")[1] for path in folder.iterdir() if _is_draft(path)}:
        with suppress(Timeout), _lock(folder / name).acquire(timeout=0):
            remove_drafts(folder, name)


def _lock(cache: Path) -> FileLock:
    return FileLock(f"{cache}.lock")


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == f".{DRAFT}"


def _size(path: Path) -> int:
    """Bytes of a folder's files; 0 when another process removes it meanwhile."""
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):
        return os.stat(path).st_mtime
    return 0.0
