"""`tunesmith serve`: hands a base model and its adapter over to `mlx_lm.server`, on loopback."""

from __future__ import annotations

import json
import logging
import os
import sys

from flows.server import LOOPBACK, free_port
from flows.targets import Target
from tasks.errors import InputError
from tasks.home import CHECKOUT

log = logging.getLogger(__name__)

PROGRAM = (
    "import tasks; from tasks.models.mlx_lm_import import import_mlx_lm; import_mlx_lm(); "
    "from mlx_lm.server import main; main()"
)
"""`tasks` first: it finds a fast BLAS, for which it is too late once MLX is there."""


def serve(target: Target, port: int) -> None:
    """Become `mlx_lm.server` for a model; this process is its process from then on.

    Raises:
        InputError: mlx-lm cannot load such an adapter.
    """
    check_servable(target)
    chosen = free_port(port)
    if chosen != port:
        log.warning("port %d is used by another program; taking %d", port, chosen)
    print(announcement(target, chosen), flush=True)
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PROGRAM, *server_arguments(target, chosen)]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def check_servable(target: Target) -> None:
    """Refuse what `mlx_lm.server` would fail on only when it is asked."""
    from tasks.train.adapters import read_adapter_config
    from tasks.train.soft_prompt import KIND

    if target.adapter is not None and read_adapter_config(target.adapter)["fine_tune_type"] == KIND:
        raise InputError(
            f"{target.name}: mlx_lm.server knows no soft prompts; 'tunesmith chat' and MLflow use them"
        )


def server_arguments(target: Target, port: int) -> list[str]:
    """What `mlx_lm.server` is started with: pages of other sites may not talk to it."""
    arguments = ["--model", str(target.model.path), "--host", LOOPBACK, "--port", str(port)]
    arguments += ["--allowed-origins", f"http://{LOOPBACK}:{port}", "--log-level", "WARNING"]
    if target.adapter is not None:
        arguments += ["--adapter-path", str(target.adapter)]
    if target.template is not None:
        arguments += ["--chat-template", target.template]
    return arguments


def announcement(target: Target, port: int) -> str:
    """The address, and a request to begin with; the server itself adds no system prompt."""
    system = [{"role": "system", "content": target.system_prompt}] if target.system_prompt else []
    body = {"messages": [*system, {"role": "user", "content": "Hello"}], "max_tokens": 100}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    address = f"http://{LOOPBACK}:{port}"
    return (
        f"{target.name}: {address}/v1 (mlx_lm.server, OpenAI's API; Ctrl-C ends it)\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'"
    )
