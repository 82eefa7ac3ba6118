"""What `tunesmith inspect` and `tunesmith prepare` do: data and its report, without a flow or a run."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.config import Settings, flatten, load_settings
from tasks.errors import InputError, StepError
from tasks.home import runs_dir
from tasks.models.resolve import resolve_model
from tasks.prepare.rows import FAULTS
from tasks.publish import INPUTS_FILE, StepOutput, publishing

PAGE_FILE = "report.html"
PREPARED = {"train.jsonl", "valid.jsonl", "test.jsonl", "tokens.safetensors", "rejected.jsonl", "report.json"}
"""The files by which prepared data is known."""

MAY_BE_THERE = {PAGE_FILE, INPUTS_FILE, "chat_template.jinja", ".DS_Store"}


def data_settings(source: str, model: str | None, overrides: Sequence[str]) -> Settings:
    """The defaults with overrides, and over them what is given by itself."""
    given = [f"data.source={_yaml(source)}"] + ([f"model.source={_yaml(model)}"] if model else [])
    return load_settings(None, [*overrides, *given])


def inspect(settings: Settings) -> dict[str, Any]:
    """The data report; nothing is kept."""
    from tasks.prepare.pipeline import inspect_data

    return inspect_data(settings.data, resolve_model(settings.model))


def prepare(settings: Settings, out: Path | None) -> tuple[StepOutput, Path]:
    """Prepare the data; the output, and the folder to use: `out` with a copy of it, or the output's own.

    Raises:
        InputError: `out` is in use for something else, or the data or the model is not as it should be.
        StepError: `out` cannot be written.
    """
    from tasks.prepare.pipeline import prepare_data

    if out is not None:
        out = out.expanduser().resolve()
        put_back(out)
        check_out(out)
    output = prepare_data(settings.data, resolve_model(settings.model))
    if out is not None:
        publish_copy(output.path, out)
    return output, out or output.path


def check_out(out: Path) -> None:
    """Refuse a place where something would be lost; an earlier output of this command may be replaced."""
    if out.is_relative_to(runs_dir() / "steps"):
        raise InputError(f"--out {out}: lies among Tunesmith's own step outputs; give another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out}: is not a folder; give a new folder, or one prepared before")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if others := sorted(found - PREPARED - MAY_BE_THERE):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"--out {out}: holds '{others[0]}'{more}, which would be lost; give a new or empty folder"
        )
    if found - MAY_BE_THERE and not found >= PREPARED:
        lacking = sorted(PREPARED - found)[0]
        raise InputError(
            f"--out {out}: is not empty, and without '{lacking}' no prepared data either; give a new folder"
        )


def publish_copy(prepared: Path, out: Path) -> None:
    """Copy prepared data to `out` whole or not at all; what is there stays until the copy is complete.

    The folder that is replaced is moved aside and back again on any failure. Should the process be
    killed between the two renames, it is whole beside `out`, and the next run puts it back.
    """
    try:
        with publishing(out) as draft:
            shutil.copytree(prepared, draft, dirs_exist_ok=True)
            if out.is_dir():
                out.rename(_aside(out))
    except OSError as error:
        reason = error.strerror or error
        raise StepError(f"--out {out}: cannot be written: {reason}; give another folder") from None
    finally:
        put_back(out)


def put_back(out: Path) -> None:
    """End a replacement, also one that was killed: the new folder if it is there, else the old one."""
    aside = _aside(out)
    if not aside.is_dir():
        return
    if out.is_dir():
        shutil.rmtree(aside)
    else:
        aside.rename(out)


def check_page(html: Path) -> None:
    """Refuse a place for the page that is a folder, has none around it, or is no page."""
    if html.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html {html}: would not open as a page; give a name that ends in .html")
    if html.is_dir() or not html.absolute().parent.is_dir():
        fault = "is a folder" if html.is_dir() else f"{html.absolute().parent} is no folder"
        raise InputError(f"--html {html}: {fault}; give a file in a folder that exists")


def prepare_command(
    source: str, model: str | None, overrides: Sequence[str], report: Mapping[str, Any]
) -> str:
    """The command that prepares what was inspected, going on without its bad rows."""
    given = ["--model", model] if model else []
    if FAULTS.keys() & report["reasons"].keys() and not any("data.on_bad_row=" in one for one in overrides):
        overrides = [*overrides, "data.on_bad_row=skip"]
    return shlex.join(["tunesmith", "prepare", source, *overrides, *given])


def finetune_command(settings: Settings, config: Path, overrides: Sequence[str]) -> str:
    """The command that trains on the data just prepared: every setting in which `config` differs is given.

    Overrides of other sections are passed on.
    """
    theirs = flatten(load_settings(config))
    ours = {key: value for key, value in flatten(settings).items() if _section(key) in ("data", "model")}
    given = [f"{key}={_yaml(value)}" for key, value in ours.items() if value != theirs[key]]
    given += [override for override in overrides if _section(override) not in ("data", "model")]
    shown = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    return shlex.join(["tunesmith", "finetune", str(shown), *given])


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _section(key: str) -> str:
    return key.partition("=")[0].partition(".")[0]


def _yaml(value: Any) -> str:
    """A value as an override takes it: text that would read as something else is quoted."""
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return written.removesuffix("...\n").strip()
