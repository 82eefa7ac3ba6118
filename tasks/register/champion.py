"""Who is @champion, and who was before: the alias moves, and a tag of the registered model remembers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.config import TrackingSettings
from tasks.errors import InputError
from tasks.home import runs_dir
from tasks.register.versions import CHAMPION, Version, find_version, versions_of
from tasks.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

BEFORE = "tunesmith.champions_before"
"""Tag of a registered model: the numbers of its champions before this one, the last one last."""

ROLLED_BACK = "tunesmith.rolled_back"
"""Tag of a version from which a person went back, and when; no run promotes it again."""

KEPT = 100
"""Champions remembered."""


@dataclass(frozen=True)
class Move:
    """@champion went from one version to another; `before` is None when there was no champion."""

    name: str
    before: int | None
    now: int


def promote(settings: TrackingSettings, name: str, number: int) -> Move:
    """Make a version @champion, whatever its figures are.

    Raises:
        InputError: there is no such version, or it is the champion.
    """
    with registry_lock():
        version = find_version(settings, name, str(number))
        if CHAMPION in version.aliases:
            raise InputError(f"{name} version {number} is @champion already")
        client, _, _ = connect(settings)
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(name, str(number), ROLLED_BACK)
        return crown(client, name, number)


def roll_back(settings: TrackingSettings, name: str) -> Move:
    """Give @champion back to the version that held it before.

    Raises:
        InputError: there is no such model, no champion, or none before this one that still exists.
    """
    with registry_lock():
        present = find_version(settings, name, CHAMPION).number
        client, _, _ = connect(settings)
        there = {version.number for version in versions_of(client, name)}
        before = [number for number in _before(client, name) if number in there]
        while before and before[-1] == present:
            before.pop()
        if not before:
            raise InputError(
                f"{name} version {present} is its first @champion: there is none to go back to; "
                f"'tunesmith promote {name} VERSION' takes any other"
            )
        *earlier, back = before
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        client.set_model_version_tag(name, str(present), ROLLED_BACK, when)
        client.set_registered_model_alias(name, CHAMPION, str(back))
        client.set_registered_model_tag(name, BEFORE, json.dumps(earlier))
        return Move(name, present, back)


def crown(client: MlflowClient, name: str, number: int) -> Move:
    """Move @champion to a version, and remember who held it; call it with `registry_lock` held."""
    present = champion_of(versions_of(client, name))
    if present is not None:
        # First: should the alias stay where it is, going back passes over the present champion.
        before = [*_before(client, name), present.number][-KEPT:]
        client.set_registered_model_tag(name, BEFORE, json.dumps(before))
    client.set_registered_model_alias(name, CHAMPION, str(number))
    return Move(name, None if present is None else present.number, number)


def champion_of(versions: list[Version]) -> Version | None:
    """The version that is @champion."""
    return next((version for version in versions if CHAMPION in version.aliases), None)


@contextmanager
def registry_lock() -> Iterator[None]:
    """One process of this machine at a time compares and moves: two finished runs would both win."""
    from filelock import FileLock

    runs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir() / ".registry.lock"):
        yield


def _before(client: MlflowClient, name: str) -> list[int]:
    written = client.get_registered_model(name).tags.get(BEFORE, "[]")
    try:
        return [int(number) for number in json.loads(written)]
    except (ValueError, TypeError):
        raise InputError(
            f"{name}: its tag {BEFORE} is no list of versions ({written[:100]}); mend it in the MLflow UI"
        ) from None
