"""What keeps a schedule alive over reboots: a launchd agent on a Mac, a systemd user unit on Linux.

Both run the very command in the foreground and start it again when it dies. They are printed, not
installed: what starts with a person's machine is theirs to put there.
"""

from __future__ import annotations

import os
import plistlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.config import CREDENTIALS
from tasks.home import CHECKOUT, runs_dir

KEPT = ("TUNESMITH_CACHE", "PREFECT_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "HF_HOME")
"""Variables that decide where things are kept, where a person has set them."""

RESTART_S = 30
"""Between a death and the next start."""


def schedule_command(
    config: Path, overrides: Sequence[str], cron: str, timezone: str | None, name: str | None = None
) -> list[str]:
    """The command that serves this schedule, good from any folder."""
    chosen = ["--timezone", timezone] if timezone else []
    chosen += ["--name", name] if name else []
    program = [sys.executable, "-m", "flows.cli", "schedule", str(config.resolve())]
    return [*program, *overrides, "--cron", cron, *chosen]


def install_hint(command: Sequence[str], name: str) -> str:
    """Both files with where they go and how they are started."""
    label = f"tunesmith.{_plain(name)}"
    agent, unit = f"~/Library/LaunchAgents/{label}.plist", f"~/.config/systemd/user/{label}.service"
    return "\n".join(
        [
            f"macOS: save this as {agent}, then: launchctl load {agent}",
            "",
            launchd_plist(command, label),
            f"Linux: save this as {unit}, then: systemctl --user enable --now {label}",
            "(and, to have it run while nobody is logged in: loginctl enable-linger)",
            "",
            systemd_unit(command, name),
        ]
    )


def launchd_plist(command: Sequence[str], label: str) -> str:
    """A launchd agent as XML; see launchd.plist(5)."""
    log = str(runs_dir() / "server" / f"{label}.log")
    agent = {
        "Label": label,
        "ProgramArguments": list(command),
        "WorkingDirectory": str(CHECKOUT),
        "EnvironmentVariables": environment(),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": RESTART_S,
        "ProcessType": "Background",
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    return plistlib.dumps(agent, sort_keys=False).decode()


def systemd_unit(command: Sequence[str], name: str) -> str:
    """A systemd user unit; see systemd.service(5). Exit codes of a stop by a person end it."""
    variables = [f"Environment={_quoted(f'{key}={value}')}" for key, value in environment().items()]
    lines = [
        "[Unit]",
        f"Description=Tunesmith: {name}",
        "",
        "[Service]",
        f"ExecStart={' '.join(map(_quoted, command))}",
        f"WorkingDirectory={_percent(str(CHECKOUT))}",
        *variables,
        "Restart=always",
        f"RestartSec={RESTART_S}",
        "SuccessExitStatus=130 143",
        "",
        "[Install]",
        "WantedBy=default.target",
        "",
    ]
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """The variables that a service needs to keep things where this command does; none with a password."""
    given = {key: os.environ[key] for key in KEPT if os.environ.get(key)}
    known = {key: value for key, value in given.items() if not CREDENTIALS.search(value)}
    return {"PYTHONPATH": str(CHECKOUT), "TUNESMITH_HOME": str(runs_dir()), **known}


def _quoted(word: str) -> str:
    """A word as systemd reads it: quotes and backslashes escaped, `%` and `$` doubled."""
    escaped = _percent(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s\"'\\;*$]", escaped) or not escaped else escaped


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "schedule"
