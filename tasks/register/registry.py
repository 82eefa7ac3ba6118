"""The MLflow model registry: every finished adapter is a @challenger, the best of them @champion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.config import RegisterSettings
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput
from tasks.tracking import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"


@dataclass(frozen=True)
class Registration:
    """What the registry holds after a run.

    Attributes:
        name, version: of the registered model.
        champion: whether this version is @champion now.
        reason: why it is, or is not.
        reused: the very same adapter was registered before.
    """

    name: str
    version: str
    champion: bool
    reason: str
    reused: bool


def register_adapter(
    settings: RegisterSettings,
    name: str,
    model: ModelFolder,
    adapter: StepOutput,
    evaluation: Evaluation,
    run: Run,
) -> Registration:
    """Make the run's adapter a version of `name`, @challenger, and @champion if it deserves it.

    With `promote: if-better` the champion changes when the new test loss is lower than that of the
    present champion on the same test rows, or, without a champion, than that of the base model.
    """
    name = settings.name or registry_name(name)
    client = run.client
    version = _find(client, name, adapter.fingerprint)
    reused = version is not None
    if version is None:
        version = _create(client, name, model, adapter, evaluation, run)
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    champion, reason = _promote(client, settings, version, evaluation)
    run.set_tags({"tunesmith.registered_model": f"{name}/{version.version}"})
    return Registration(name, str(version.version), champion, reason, reused)


def registry_name(text: str) -> str:
    """`text` as a registered model's name: MLflow forbids slashes, colons and the like."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _find(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.adapter = '{fingerprint}'")
    return found[0] if found else None


def _create(
    client: MlflowClient,
    name: str,
    model: ModelFolder,
    adapter: StepOutput,
    evaluation: Evaluation,
    run: Run,
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Adapters for {model.name}, made by Tunesmith")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "adapter": adapter.fingerprint,
        "base_model": model.name,
        "base_fingerprint": model.fingerprint,
        "test_data": evaluation.test_data,
        "test_loss": repr(evaluation.figures()["tuned"]["test_loss"]),
    }
    return client.create_model_version(name, f"runs:/{run.id}/adapter", run.id, tags=tags)


def _promote(
    client: MlflowClient, settings: RegisterSettings, version: ModelVersion, evaluation: Evaluation
) -> tuple[bool, str]:
    """Move @champion if the policy says so; whether `version` holds it now, and why."""
    champion = _champion(client, version.name)
    if champion is not None and champion.version == version.version:
        return True, "it is the champion already"
    if settings.promote == "never":
        return False, "register.promote is 'never'"
    deserves, reason = True, "register.promote is 'always'"
    if settings.promote == "if-better":
        deserves, reason = _better(version, champion, evaluation)
    if deserves:
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return deserves, reason


def _better(version: ModelVersion, champion: ModelVersion | None, evaluation: Evaluation) -> tuple[bool, str]:
    figures = evaluation.figures()
    tuned = figures["tuned"]["test_loss"]
    if champion is None:
        rival, loss = "the base model", figures["base"]["test_loss"]
    elif champion.tags.get("test_data") != evaluation.test_data:
        return False, f"version {champion.version}, the champion, was measured on other test rows"
    else:
        rival, loss = f"version {champion.version}", float(champion.tags["test_loss"])
    verdict = "below" if tuned < loss else "not below"
    return tuned < loss, f"test loss {tuned:.4f} is {verdict} {loss:.4f} of {rival}"


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
