"""The MLflow model registry: every finished adapter is a @challenger, the best of them @champion."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.config import Settings
from tasks.errors import InputError
from tasks.evaluate.measure import EVALUATION_FILE, measure
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.find import find_base
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, is_forced
from tasks.register.champion import ROLLED_BACK, champion_of, crown, registry_lock
from tasks.register.compare import Figures, Verdict, compare
from tasks.register.mlflow_model import ARTIFACT_PATH, log_mlflow_model
from tasks.register.versions import CHALLENGER, FIGURE, Version, versions_of
from tasks.tracking import Run, read_folder
from tasks.train.use import read_use

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Tag of a version: the fingerprint of its adapter."""

EXAMPLE = "What can you do?"
"""The input example of an adapter that was evaluated on no questions."""

EXAMPLE_CHARS = 1000


@dataclass(frozen=True)
class Candidate:
    """What a finished run has made."""

    model: ModelFolder
    adapter: StepOutput
    data: StepOutput
    evaluation: Evaluation


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


def register_adapter(settings: Settings, name: str, made: Candidate, run: Run) -> Registration:
    """Make the run's adapter a version of `name`, @challenger, and @champion if it deserves it.

    With `register.promote: if-better` the champion changes when the new adapter is better than the
    present champion on the present test rows by `register.metric`, beyond chance, or, without a champion,
    better than the base model. A champion that was measured on other rows is measured on these. An
    adapter that was registered before stays the version it is.
    """
    name = settings.register_.name or registry_name(name)
    client = run.client
    with registry_lock():
        version = _find(versions_of(client, name), made.adapter.fingerprint)
        if is_forced("register"):
            version = None
        reused = version is not None
        if version is None:
            _create(client, name, made, run)
            version = _find(versions_of(client, name), made.adapter.fingerprint)
            assert version is not None, "it was created just now"
        client.set_registered_model_alias(name, CHALLENGER, str(version.number))
        verdict = _promote(client, settings, version, made)
    run.set_tags({"tunesmith.registered_model": f"{name}/{version.number}"})
    return Registration(name, str(version.number), verdict.better, verdict.reason, reused)


def registry_name(text: str) -> str:
    """`text` as a registered model's name: MLflow forbids slashes, colons and the like."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _find(versions: list[Version], fingerprint: str) -> Version | None:
    """The newest version of an adapter."""
    equal = [version for version in versions if version.tags.get(ADAPTER) == fingerprint]
    return max(equal, key=lambda version: version.number, default=None)


def _create(client: MlflowClient, name: str, made: Candidate, run: Run) -> None:
    """Files first, the version last: what an outage leaves half done, the next try does again."""
    from mlflow.exceptions import MlflowException

    tuned = made.evaluation.figures()["tuned"]
    lineage = _lineage(made, run)
    source = log_mlflow_model(run, _example(tuned), lineage)
    try:
        client.create_registered_model(name, description=f"Adapters for {made.model.name}, made by Tunesmith")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    figures = {f"{FIGURE}{key}": repr(value) for key, value in tuned.items() if isinstance(value, float)}
    client.create_model_version(name, source, run.id, tags={**lineage, **figures})


def _lineage(made: Candidate, run: Run) -> dict[str, str]:
    """From what a version came, by fingerprints and ids."""
    source = made.model.settings.model_dump(mode="json") if made.model.settings else made.model.source
    return {
        ADAPTER: made.adapter.fingerprint,
        "base_model": made.model.name,
        "base_fingerprint": made.model.fingerprint,
        "base_source": source if isinstance(source, str) else json.dumps(source),
        "data_fingerprint": made.data.fingerprint,
        "mlflow.run_id": run.id,
        "prefect.flow_run_id": run.tag("prefect.flow_run_id") or "",
    }


def _example(tuned: Figures) -> str:
    answers: list[dict[str, Any]] = tuned.get("answers", [])
    prompt = str(answers[0]["prompt"]) if answers else ""
    return prompt[:EXAMPLE_CHARS] or EXAMPLE


def _promote(client: MlflowClient, settings: Settings, version: Version, made: Candidate) -> Verdict:
    """Move @champion if the policy says so; whether `version` holds it now, and why."""
    policy = settings.register_.promote
    champion = champion_of(versions_of(client, version.name))
    if champion is not None and champion.number == version.number:
        return Verdict(True, "it is the champion already")
    if policy == "never":
        return Verdict(False, "register.promote is 'never'")
    if when := version.tags.get(ROLLED_BACK):
        again = f"'tunesmith promote {version.name} {version.number}' makes it champion all the same"
        return Verdict(False, f"it was champion until a person went back on {when}; {again}")
    verdict = Verdict(True, "register.promote is 'always'")
    if policy == "if-better":
        verdict = _judge(settings, champion, made)
    if verdict.better:
        crown(client, version.name, version.number)
    return verdict


def _judge(settings: Settings, champion: Version | None, made: Candidate) -> Verdict:
    metric, figures = settings.register_.metric, made.evaluation.figures()
    if champion is None:
        return compare(metric, figures["tuned"], figures["base"], "the base model")
    rival = f"version {champion.number}"
    try:
        measured = _measured(settings, champion, made)
    except InputError as fault:
        log.warning("register: %s, the champion, cannot be measured on these test rows: %s", rival, fault)
        by_hand = f"'tunesmith promote {champion.name} VERSION' decides by hand"
        return Verdict(False, f"{rival}, the champion, cannot be measured on these test rows; {by_hand}")
    return compare(metric, figures["tuned"], measured, rival)


def _measured(settings: Settings, champion: Version, made: Candidate) -> Figures:
    """The champion's evaluation on the present test rows, as the challenger was evaluated.

    It is the one made when the champion was, where rows and settings are the same.

    Raises:
        InputError: its adapter or its base is gone, or it reads other tokens than these rows are made of.
    """
    from tasks.prepare.pipeline import tokenizer_digest

    folder = read_folder(settings.tracking, champion.run_id, ARTIFACT_PATH) if champion.run_id else None
    if folder is None or ADAPTER not in champion.tags:
        raise InputError("it was not registered by a run of Tunesmith, or that run's adapter is gone")
    model, use = made.model, read_use(folder)
    if champion.tags.get("base_fingerprint") != model.fingerprint:
        if use is None:
            raise InputError(f"{folder}: nothing says what its base model is")
        model = find_base(use.base_name, use.base_fingerprint, use.base)
    if tokenizer_digest(model.path) != tokenizer_digest(made.model.path):
        raise InputError(f"its base {model.name} has another tokenizer than {made.model.name}")
    adapter = StepOutput(folder, champion.tags[ADAPTER], True, 0.0)
    figures: Figures = measure(settings.evaluate, model, adapter, made.data).read_json(EVALUATION_FILE)
    return figures
