"""`tunesmith doctor`: looks at everything a fine-tune needs, and says what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flows.server import running_server
from tasks.config import Settings
from tasks.home import cache_dir, runs_dir
from tasks.process import blas_advice
from tasks.progress import progress

GB = 10**9
TIGHT_MEMORY_BYTES = 4 * GB
TIGHT_DISK_BYTES = 5 * GB
TRIAL_ROWS = 10
SLOW_PRODUCT = 20.0  # GFLOP/s; reference BLAS gives about 5, OpenBLAS on two cores about 150


@dataclass(frozen=True)
class Finding:
    """What a look at one thing gave; `ok` is None for a warning."""

    value: str
    ok: bool | None = True
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """A named finding; `ok` is None for a warning, `advice` is empty when nothing need be done."""

    name: str
    ok: bool | None
    value: str
    advice: str


@dataclass(frozen=True)
class Look:
    """One thing to look at, and what to advise when looking raises."""

    at: Callable[[Settings], Finding]
    advice: str


def diagnose(settings: Settings, looks: Mapping[str, Look] | None = None) -> Iterator[Check]:
    """Look at one thing after the other; each check is yielded as soon as it is known.

    A look that raises becomes a failed check with the exception's first line; nothing is left out.

    Args:
        settings: whose model, data and store are tried.
        looks: what to look at, by name; `LOOKS` unless given.
    """
    for name, look in (LOOKS if looks is None else looks).items():
        with progress(f"checking {name}"):
            try:
                finding = look.at(settings)
            except Exception as error:
                finding = Finding(_first_line(error), False, look.advice)
        yield Check(name, finding.ok, finding.value, finding.advice)


def python_version(_: Settings) -> Finding:
    """3.11 to 3.13, as `requires-python` says."""
    known = sys.version_info[:2]
    value = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    ok = (3, 11) <= known < (3, 14)
    return Finding(value, ok, "" if ok else "use Python 3.11, 3.12 or 3.13")


def package_versions(_: Settings) -> Finding:
    """Every declared dependency is installed in its range; a wrong SQLAlchemy silently stops schedules."""
    from packaging.requirements import Requirement

    wrong = []
    for line in importlib.metadata.requires("tunesmith") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        version = _version(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} {version or 'missing'} (needed: {needed.specifier})")
    if wrong:
        return Finding("; ".join(wrong), False, "install the versions of requirements.lock: 'make setup'")
    names = ("mlx-lm", "mlflow", "optuna", "prefect", "fastapi", "sqlalchemy")
    return Finding(", ".join(f"{name} {_version(name)}" for name in names))


def mlx_device(_: Settings) -> Finding:
    """MLX computes on its default device."""
    import mlx.core as mx

    from tasks.models.device import device_name

    if mx.arange(4).sum().item() != 6:
        return Finding(f"{device_name()} computes wrongly", False, "reinstall MLX: 'make setup'")
    return Finding(f"{_version('mlx')} on {device_name()}")


def blas_speed(_: Settings) -> Finding:
    """GFLOP/s of a 1024 by 1024 float32 product on the default device: the best of five."""
    import mlx.core as mx

    size = 1024
    matrix = mx.random.normal((size, size))
    mx.eval(matrix)
    best_s = float("inf")
    for _turn in range(5):
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        best_s = min(best_s, time.perf_counter() - started)
    speed = 2 * size**3 / best_s / 1e9
    if speed >= SLOW_PRODUCT:
        return Finding(f"{speed:,.0f} GFLOP/s")
    return Finding(f"{speed:.1f} GFLOP/s", None, blas_advice() or "is the machine busy with something else?")


def memory(_: Settings) -> Finding:
    """Memory that is free now."""
    import psutil

    now = psutil.virtual_memory()
    value = f"{now.available / GB:.1f} GB free of {now.total / GB:.1f} GB"
    if now.available >= TIGHT_MEMORY_BYTES:
        return Finding(value)
    return Finding(value, None, "close other programs, or lower train.batch_size and data.max_seq_length")


def disk(_: Settings) -> Finding:
    """The folders of runs and of imported models can be written to and have room."""
    import psutil

    values, ok, advice = [], True, []
    for name, folder in (("runs", runs_dir()), ("models", cache_dir())):
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free_bytes = psutil.disk_usage(str(place)).free
        values.append(f"{name} {free_bytes / GB:.1f} GB free in {folder}")
        if not os.access(place, os.W_OK) or not place.is_dir():
            variable = "TUNESMITH_HOME" if name == "runs" else "TUNESMITH_CACHE"
            ok = False
            advice.append(f"{place} cannot be written to: name another folder in {variable}")
        elif free_bytes < TIGHT_DISK_BYTES:
            advice.append(f"a model and its fused copy need room: free some on the disk of {place}")
    return Finding("; ".join(values), (not advice or None) if ok else False, "; ".join(advice))


def mlflow_store(settings: Settings) -> Finding:
    """A run can be written to the tracking store, and be deleted again."""
    from tasks.tracking import check_store

    return Finding(f"{check_store(settings.tracking)} takes runs")


def prefect_server(_: Settings) -> Finding:
    """Prefect can be imported; a local server is up or not, either of which will do."""
    import prefect

    if server := running_server():
        return Finding(f"{prefect.__version__}, local server {server.url} up since {server.started}")
    return Finding(f"{prefect.__version__}, no local server; flows start sooner after 'tunesmith up'")


def base_model(settings: Settings) -> Finding:
    """The base model is found, imported if need be, and loads."""
    from tasks.models.load import load_model
    from tasks.models.resolve import resolve_model

    folder = resolve_model(settings.model)
    loaded = load_model(folder.path)
    return Finding(f"{folder.name}, {len(loaded.model.layers)} layers, in {folder.path}")


def data_rows(settings: Settings) -> Finding:
    """The data is read, and its rows become tokens of the base model."""
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import REPORT_FILE, prepare_data

    report = prepare_data(settings.data, resolve_model(settings.model)).read_json(REPORT_FILE)
    return Finding(f"{report['rows_used']:,} of {report['rows_read']:,} rows of {report['source']} used")


def trial_step(settings: Settings) -> Finding:
    """One update on the first ten training rows gives a finite loss."""
    from tasks.models.load import load_model
    from tasks.models.resolve import resolve_model
    from tasks.prepare.pipeline import prepare_data
    from tasks.prepare.splits import load_splits
    from tasks.train.adapters import adapter_config, add_adapter
    from tasks.train.loop import fit
    from tasks.train.targets import target_keys

    folder = resolve_model(settings.model)
    rows = load_splits(prepare_data(settings.data, folder).path)["train"].first(TRIAL_ROWS)
    network = load_model(folder.path).model
    one_step = settings.train.model_copy(update={"max_steps": 1, "batch_size": TRIAL_ROWS})
    keys = target_keys(network, one_step.targets, one_step.num_layers)
    add_adapter(network, adapter_config(one_step, len(network.layers), keys), one_step.seed)
    training = fit(network, rows, rows, one_step, lambda step, metrics: None)
    before, after = training.val_loss_before, training.best_val_loss
    return Finding(f"{len(rows)} rows, loss {before:.3f} then {after:.3f}, {training.seconds:.1f} s")


LOOKS: dict[str, Look] = {
    "Python": Look(python_version, "use Python 3.11, 3.12 or 3.13"),
    "packages": Look(package_versions, "install the versions of requirements.lock: 'make setup'"),
    "MLX": Look(mlx_device, "reinstall MLX: 'make setup'; on Linux with a GPU, the extra cuda12 or cuda13"),
    "BLAS": Look(blas_speed, "reinstall MLX: 'make setup'"),
    "memory": Look(memory, "is psutil installed? 'make setup'"),
    "disk": Look(disk, "name a folder that can be written to in TUNESMITH_HOME"),
    "MLflow": Look(mlflow_store, "see tracking.uri and MLFLOW_TRACKING_URI; is the store locked or damaged?"),
    "Prefect": Look(prefect_server, "install the versions of requirements.lock: 'make setup'"),
    "model": Look(base_model, "see model.source"),
    "data": Look(data_rows, "see data.source"),
    "trial step": Look(trial_step, "see the train settings: 'tunesmith show'"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
