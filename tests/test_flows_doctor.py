"""The doctor looks at everything, leaves nothing out, and says what to do."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import doctor
from flows.doctor import LOOKS, Finding, Look, diagnose
from tasks.config import Settings
from tasks.models.folder import ModelFolder


@pytest.fixture
def settings(tiny_model: ModelFolder) -> Settings:
    return Settings.model_validate({"model": {"source": str(tiny_model.path)}, "train": {"num_layers": 2}})


def test_a_look_that_raises_is_a_failed_check_with_its_first_line_and_the_rest_goes_on() -> None:
    def breaks(_: Settings) -> Finding:
        raise ValueError("broken pipe in the cellar\n  second line")

    looks = {"cellar": Look(breaks, "call a plumber"), "roof": Look(lambda _: Finding("tight"), "")}
    first, second = diagnose(Settings(), looks)
    assert (first.name, first.ok, first.value) == ("cellar", False, "broken pipe in the cellar")
    assert first.advice == "call a plumber"
    assert (second.name, second.ok, second.value) == ("roof", True, "tight")


def test_checks_come_one_at_a_time() -> None:
    seen: list[str] = []

    def look(_: Settings) -> Finding:
        seen.append("looked")
        return Finding("seen")

    checks = diagnose(Settings(), {"one": Look(look, ""), "two": Look(look, "")})
    assert next(checks).name == "one"
    assert seen == ["looked"]


def test_every_look_gives_a_check_on_a_machine_that_is_well(settings: Settings) -> None:
    checks = {check.name: check for check in diagnose(settings)}
    assert set(checks) == set(LOOKS)
    assert not [check for check in checks.values() if check.ok is False]
    assert "GFLOP/s" in checks["BLAS"].value
    assert all(look.advice for look in LOOKS.values())


@pytest.mark.parametrize("package", ["sqlalchemy", "fastapi"])
def test_a_version_that_would_silently_stop_schedules_fails(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.1.0" if name == package else version(name)
    )
    finding = doctor.package_versions(Settings())
    assert finding.ok is False
    assert f"{package} 2.1.0" in finding.value
    assert "requirements.lock" in finding.advice


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "prefect missing" in doctor.package_versions(Settings()).value


def test_slow_products_come_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_PRODUCT", 1e9)
    monkeypatch.setattr(doctor, "blas_advice", lambda: "apt-get install libopenblas0-pthread")
    finding = doctor.blas_speed(Settings())
    assert finding.ok is None
    assert "libopenblas0-pthread" in finding.advice


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9, total=8 * 10**9))
    finding = doctor.memory(Settings())
    assert (finding.ok, finding.value) == (None, "1.0 GB free of 8.0 GB")
    assert finding.advice


def test_little_room_is_a_warning_and_a_file_in_the_way_a_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TIGHT_DISK_BYTES", 10**18)
    assert doctor.disk(Settings()).ok is None
    (home / "file").touch()
    monkeypatch.setenv("TUNESMITH_HOME", str(home / "file" / "runs"))
    finding = doctor.disk(Settings())
    assert finding.ok is False
    assert "TUNESMITH_HOME" in finding.advice


def test_a_damaged_store_and_a_missing_model_are_told_with_their_reason(
    home: Path, settings: Settings
) -> None:
    (home / "mlflow.db").write_text("not a database, certainly not\n" * 100, encoding="utf-8")
    missing: dict[str, Any] = {"model": {"source": str(home / "absent.gguf")}}
    looks = {name: LOOKS[name] for name in ("MLflow", "model")}
    store, model = diagnose(Settings.model_validate(missing), looks)
    assert (store.ok, model.ok) == (False, False)
    assert "not a database" in store.value
    assert "absent.gguf" in model.value
    assert store.advice
    assert model.advice
