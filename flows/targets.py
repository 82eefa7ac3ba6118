"""What a person means by a model to use: a run, a registered version, an adapter, or a model by itself.

RUN             id, beginning of the id, or name of an MLflow run: its adapter
NAME@alias      a version of a registered model by its alias, as NAME@champion
NAME/VERSION    the same by its number
ADAPTER         a folder with adapter_config.json, of Tunesmith, mlx-lm or PEFT
MODEL           what model.source takes: a folder (a fused model too), a .gguf file, a hub name
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.find_run import ID_LENGTH, find_run, matching_runs, store_name
from tasks.config import ModelSettings, TrackingSettings
from tasks.errors import InputError
from tasks.models.bundled import BUNDLED_SOURCE
from tasks.models.find import find_base
from tasks.models.folder import ModelFolder
from tasks.models.hub import is_hub_name
from tasks.models.resolve import resolve_model
from tasks.tracking import StoredRun, read_folder, stored_runs
from tasks.train.use import read_use

ADAPTER_CONFIG = "adapter_config.json"

FORMS = "give a run, NAME@champion, NAME/VERSION, an adapter folder, or what model.source takes"


@dataclass(frozen=True)
class Target:
    """A model to use.

    Attributes:
        name: for people: "run sums-layers2 (1a2b3c4d)", "sums@champion (version 3)", a path.
        model: the base model.
        adapter: a folder in mlx-lm's layout; None for a model by itself.
        run_id: the MLflow run the adapter came from, where that is known.
        template: the chat template in Jinja it was trained with; None for the model's own.
        system_prompt: put before chats that have none, as in training.
    """

    name: str
    model: ModelFolder
    adapter: Path | None = None
    run_id: str | None = None
    template: str | None = None
    system_prompt: str | None = None


def find_target(text: str) -> Target:
    """The model that `text` means; see the forms above. A path that exists is taken first.

    Raises:
        InputError: it means nothing, or several things, or something of it is gone.
    """
    path = Path(text).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        return adapter_target(str(path), path.resolve())
    if path.exists() or text == BUNDLED_SOURCE:
        return _model(text)
    name, at, alias = text.rpartition("@")
    if at and name and alias:
        return version_target(name, alias)
    name, slash, number = text.rpartition("/")
    if slash and number.isdecimal() and not is_hub_name(name):
        return version_target(name, number)
    if is_hub_name(text) or "/" in text or text.endswith(".gguf"):
        return _model(text)
    if not matching_runs(text, TrackingSettings()):
        where = store_name(TrackingSettings())
        raise InputError(
            f"'{text}': no such file or folder, and no run of that id or name in {where}; {FORMS}"
        )
    return run_target(find_run(text, TrackingSettings()))


def newest_target() -> Target:
    """The newest finished run that has an adapter: what a person has just made.

    Raises:
        InputError: there is none.
    """
    for run in stored_runs(TrackingSettings()):
        if run.status == "FINISHED" and read_folder(TrackingSettings(), run.id, "adapter"):
            return run_target(run)
    raise InputError(f"{store_name(TrackingSettings())} has no finished run with an adapter; {FORMS}")


def version_target(name: str, which: str) -> Target:
    """A version of a registered model, by alias or number."""
    from tasks.register.versions import find_version

    version = find_version(TrackingSettings(), name, which)
    told = f"{name}/{version.number}" if which.isdecimal() else f"{name}@{which} (version {version.number})"
    return _adapter_of_run(told, version.run_id)


def run_target(run: StoredRun) -> Target:
    """The adapter of a run."""
    return _adapter_of_run(f"run {run.name} ({run.id[:ID_LENGTH]})", run.id)


def adapter_target(name: str, folder: Path, run_id: str | None = None) -> Target:
    """An adapter's folder with its base model.

    Raises:
        InputError: the folder is no adapter, names no base, or its base is gone or has changed.
    """
    from tasks.train.adapters import read_adapter_config
    from tasks.train.peft_config import is_peft, peft_base
    from tasks.train.peft_import import as_mlx_adapter

    if is_peft(folder):
        model = resolve_model(ModelSettings(source=peft_base(folder)))
        return Target(name, model, as_mlx_adapter(folder, model), run_id)
    config = read_adapter_config(folder)
    use = read_use(folder)
    if use is not None:
        base = find_base(use.base_name, use.base_fingerprint, use.base)
        return Target(name, base, folder, run_id, use.template, use.system_prompt)
    source = config.get("model")  # as mlx_lm.lora writes it
    if not isinstance(source, str):
        raise InputError(
            f'{folder}: says nothing of its base model; put "model": "…" (a folder or hub name) into its '
            f"{ADAPTER_CONFIG}"
        )
    return Target(name, resolve_model(ModelSettings(source=source)), folder, run_id)


def _adapter_of_run(name: str, run_id: str) -> Target:
    folder = read_folder(TrackingSettings(), run_id, "adapter") if run_id else None
    if folder is None:
        raise InputError(f"{name}: has no adapter; 'tunesmith models' shows what is registered; or {FORMS}")
    return adapter_target(name, folder, run_id)


def _model(source: str) -> Target:
    return Target(source, resolve_model(ModelSettings(source=source)))
