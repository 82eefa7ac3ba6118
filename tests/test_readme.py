"""What the README and the configs tell a person to type exists, and the lock is clean."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flows.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOCK = (ROOT / "requirements.lock").read_text()


def commands() -> list[str]:
    """Every `tunesmith …` in code of the README and in the heads of the configs."""
    texts = re.findall(r"`(tunesmith [^`]+)`", README)
    for config in sorted((ROOT / "flows" / "configs").glob("*.yaml")):
        texts += re.findall(r"^# (tunesmith .*?)(?:  .*)?$", config.read_text(), re.MULTILINE)
    return sorted(set(texts))


@pytest.mark.parametrize("command", commands())
def test_commands_that_are_written_down_parse_and_name_files_that_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    app.parse_args(words, exit_on_error=False, print_error=False)
    for word in words:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file()


def test_make_targets_that_are_written_down_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE))
    assert {"quickstart", "test", "setup", "lint", "slow", "bench"} <= named <= targets


def test_files_and_pictures_of_the_readme_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).is_file(), name
    tree = README.split("## The tree")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert list(ROOT.glob(f"*/{name}")), name


def test_the_lock_names_versions_and_no_address() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"^[a-z0-9.-]+==[^ ]+( ; .*)?$", line) for line in lines)
    assert "://" not in LOCK


def test_the_lock_satisfies_every_dependency_and_holds_the_pins_that_schedules_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [Requirement(text) for text in project["project"]["dependencies"]]
    locked: dict[str, list[str]] = {}
    for line in LOCK.splitlines():
        name, _, version = line.partition("==")
        locked.setdefault(name, []).append(version.split(" ")[0])
    for requirement in wanted:
        for version in locked[requirement.name]:
            assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"
    pins = {requirement.name: requirement.specifier for requirement in wanted}
    assert not pins["fastapi"].contains("0.155")
    assert not pins["sqlalchemy"].contains("2.1.0")
