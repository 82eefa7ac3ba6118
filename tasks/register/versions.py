"""What the MLflow model registry holds, read: registered models, their versions, who is @champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.config import TrackingSettings
from tasks.errors import InputError
from tasks.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"

FIGURE = "figure."
"""Of a version's tags, those that begin so are figures of its evaluation."""

UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a name, version or alias that is not there."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        name, number: of the registered model, and of the version.
        aliases: sorted, without "@".
        run_id: the MLflow run it came from; empty when unknown.
        created_ms: since 1970.
        tags: lineage and figures, as registered.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str
    created_ms: int
    tags: Mapping[str, str]

    @property
    def figures(self) -> dict[str, float]:
        """The figures it was registered with, by metric."""
        return {
            key.removeprefix(FIGURE): float(value)
            for key, value in self.tags.items()
            if key.startswith(FIGURE)
        }


def registered_versions(settings: TrackingSettings, name: str | None = None) -> list[Version]:
    """Every version of every registered model, or of `name`: by name, the newest first.

    Raises:
        InputError: no model of that name is registered.
    """
    client, _, _ = connect(settings)
    names = known_names(client)
    if name is not None and name not in names:
        raise InputError(unknown_name(name, names))
    return [
        version
        for each in ([name] if name is not None else names)
        for version in sorted(versions_of(client, each), key=lambda found: -found.number)
    ]


def find_version(settings: TrackingSettings, name: str, which: str) -> Version:
    """The version of a registered model with a number, or with an alias.

    Raises:
        InputError: there is no such model, or no such version of it.
    """
    client, _, _ = connect(settings)
    versions = versions_of(client, name)
    for version in versions:
        if which == str(version.number) or which in version.aliases:
            return version
    if not versions:
        raise InputError(unknown_name(name, known_names(client)))
    raise InputError(
        f"{name} has no {f'version {which}' if which.isdecimal() else f'@{which}'}; it has "
        f"{_listed(versions)}; 'tunesmith models {name}' shows them"
    )


def versions_of(client: MlflowClient, name: str) -> list[Version]:
    """All versions of a registered model, none when it is not registered, with their aliases.

    The list comes from a search, whose results carry no aliases (mlflow 3.17): they are the model's.
    """
    from mlflow.exceptions import MlflowException

    try:
        aliases = dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code in UNKNOWN:
            return []
        raise
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += [_plain(version, aliases) for version in page]
        token = page.token
        if not token:
            return found


def known_names(client: MlflowClient) -> list[str]:
    """The names of all registered models, sorted."""
    names, token = [], None
    while True:
        page = client.search_registered_models(page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


def unknown_name(name: str, names: list[str]) -> str:
    """What to say of a name under which nothing is registered."""
    there = f"there are {', '.join(names)}" if names else "there are none yet: 'tunesmith finetune' makes one"
    return f"no registered model '{name}'; {there}"


def _plain(version: ModelVersion, aliases: Mapping[str, str]) -> Version:
    number = int(version.version)
    mine = tuple(sorted(alias for alias, of in aliases.items() if int(of) == number))
    created = int(version.creation_timestamp or 0)
    return Version(version.name, number, mine, version.run_id or "", created, dict(version.tags))


def _listed(versions: list[Version]) -> str:
    return ", ".join(
        str(version.number) + "".join(f" @{alias}" for alias in version.aliases)
        for version in sorted(versions, key=lambda found: found.number)
    )
