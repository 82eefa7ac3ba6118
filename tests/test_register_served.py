"""Three real runs in the registry, the best of them loaded by MLflow, answering as it does here."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows.server import free_port
from flows.targets import find_target
from tasks.answer import Answering, Sampling
from tasks.config import Settings, TrackingSettings
from tasks.errors import InputError
from tasks.evaluate.side_by_side import evaluate_adapter
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder
from tasks.models.resolve import resolve_model
from tasks.prepare.pipeline import prepare_data
from tasks.register.champion import roll_back
from tasks.register.mlflow_model import CODE_FILE
from tasks.register.registry import Candidate, Registration, register_adapter
from tasks.register.versions import find_version
from tasks.tracking import mlflow_run, read_folder
from tasks.train.step import train_adapter

pytestmark = pytest.mark.usefixtures("store")

HERE = TrackingSettings()


@pytest.fixture
def settings(tiny_model: ModelFolder, tmp_path: Path) -> Settings:
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Settings.model_validate(
        {
            "model": {"source": str(tiny_model.path)},
            "data": {"source": str(data), "system_prompt": "Add."},
            "train": {"num_layers": 4, "learning_rate": 1e-2, "warmup_steps": 0},
            "evaluate": {"samples": 2, "max_tokens": 5},
            "register": {"name": "sums"},
        }
    )


def finish(settings: Settings, max_steps: int, data_seed: int = 0) -> Registration:
    """The steps of a finetune, without Prefect, fusing and report."""
    train = settings.train.model_copy(update={"max_steps": max_steps})
    model = resolve_model(settings.model)
    with mlflow_run(settings, f"steps-{max_steps}", {}) as run:
        data = prepare_data(settings.data.model_copy(update={"seed": data_seed}), model, run)
        adapter = train_adapter(train, model, data, run)
        evaluation = evaluate_adapter(settings.evaluate, model, adapter, data, run, train)
        return register_adapter(settings, "sums", Candidate(model, adapter, data, evaluation), run)


def test_three_runs_make_a_champion_that_mlflow_loads_and_a_rollback_returns_the_one_before(
    settings: Settings, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    first, better, worse = finish(settings, 4), finish(settings, 30), finish(settings, 2)
    assert [told.champion for told in (first, better, worse)] == [True, True, False]

    target = find_target("sums@champion")
    assert target.name == "sums@champion (version 2)"
    model = mlflow.pyfunc.load_model("models:/sums@champion")
    answering = Answering(target.model.path, target.adapter, target.template, target.system_prompt)
    chat = [{"role": "user", "content": "What is 5 plus 5?"}]
    expected = "".join(piece.text for piece in answering.stream(chat, Sampling(max_tokens=6)))
    assert expected
    for asked in ({"prompt": "What is 5 plus 5?"}, [{"prompt": "What is 5 plus 5?"}], {"messages": chat}):
        assert model.predict(asked, params={"max_tokens": 6}) == [expected]
    assert model.metadata.metadata["base_fingerprint"] == target.model.fingerprint
    assert model.metadata.signature.params.to_dict()[0]["name"] == "max_tokens"
    assert model.input_example["prompt"][0].startswith("What is")

    went = roll_back(HERE, "sums")
    assert (went.before, went.now) == (2, 1)
    assert find_target("sums@champion").name == "sums@champion (version 1)"

    moved = finish(settings, 5, data_seed=1)
    assert "of version 1" in moved.reason, "the champion was measured on the new test rows"


def test_a_version_is_one_folder_that_mlx_lm_reads_too_and_holds_no_base(settings: Settings) -> None:
    from mlx_lm import load

    finish(settings, 2)
    version = find_version(HERE, "sums", "1")
    folder = read_folder(HERE, version.run_id, "adapter")
    assert folder is not None
    assert {"MLmodel", "adapters.safetensors", "use.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.pkl"))
    assert len(list(folder.rglob("*.safetensors"))) == 1
    assert str(CHECKOUT) not in (folder / "MLmodel").read_text()
    load(settings.model.source, adapter_path=str(folder))


def test_mlflows_server_answers_rows_and_chats_and_says_what_is_wrong_with_others(
    settings: Settings, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    finish(settings, 2)
    client = TestClient(init(mlflow.pyfunc.load_model("models:/sums/1")))

    def ask(body: dict[str, Any]) -> tuple[int, Any]:
        answer = client.post("/invocations", json=body)
        return answer.status_code, answer.json()

    few = {"params": {"max_tokens": 3}}
    chat = [{"role": "user", "content": "What is 1 plus 1?"}]
    status, told = ask({"dataframe_records": [{"prompt": "What is 1 plus 1?"}], **few})
    assert status == 200
    answers = told["predictions"]
    assert ask({"dataframe_records": [{"messages": chat}], **few}) == (200, {"predictions": answers})
    assert ask({"inputs": {"prompt": ["What is 1 plus 1?"] * 2}, **few}) == (
        200,
        {"predictions": answers * 2},
    )
    assert ask({"messages": chat, "max_tokens": 3}) == (200, answers)
    for wrong, message in (
        ({"inputs": ["What is 1 plus 1?"]}, "give rows as"),
        ({"dataframe_records": [{"prompt": "a", "messages": chat}]}, "row 1: give rows as"),
        ({"dataframe_records": [{"prompt": "a"}], "params": {"max_tokens": 0}}, "max_tokens = 0"),
        ({"dataframe_records": [{"prompt": "a" * 600}]}, "the model reads 512"),
    ):
        status, told = ask(wrong)
        assert status == 400
        assert message in told["message"]


def test_a_version_whose_base_is_gone_says_so(settings: Settings, store: Path, tmp_path: Path) -> None:
    import shutil

    import mlflow.pyfunc

    base = tmp_path / "base"
    shutil.copytree(settings.model.source, base)
    finish(settings.model_copy(update={"model": settings.model.model_copy(update={"source": str(base)})}), 2)
    shutil.rmtree(base)
    folder = read_folder(HERE, find_version(HERE, "sums", "1").run_id, "adapter")
    with pytest.raises(InputError, match=f"{base}.*no such file or folder"):
        mlflow.pyfunc.load_model(str(folder))


def test_without_tunesmith_a_version_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tasks.register.served", None)
    with pytest.raises(ImportError, match="install Tunesmith into this environment"):
        runpy.run_path(str(CODE_FILE))


def asked(url: str, body: dict[str, Any] | None, process: subprocess.Popen[bytes]) -> Any:
    """The JSON answer to a request, tried until the server is up or has ended."""
    deadline = time.monotonic() + 240
    while True:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
            ) as answer:
                return json.loads(answer.read())
        except urllib.error.URLError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline
            time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and what it started."""
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


@pytest.mark.slow
def test_mlflow_models_serve_answers_a_request(settings: Settings, store: Path, tmp_path: Path) -> None:
    finish(settings, 4)
    port = free_port(47900)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/sums@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "PYTHONPATH": str(CHECKOUT), "PATH": path}
    server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **here}, start_new_session=True)
    try:
        body = {"dataframe_records": [{"prompt": "What is 1 plus 1?"}], "params": {"max_tokens": 4}}
        told = asked(f"http://127.0.0.1:{port}/invocations", body, server)
    finally:
        stop(server)
    assert len(told["predictions"]) == 1
    assert isinstance(told["predictions"][0], str)


@pytest.mark.slow
def test_tunesmith_serve_answers_in_the_form_of_openai(settings: Settings, store: Path) -> None:
    finish(settings, 4)
    port = free_port(47950)
    command = [sys.executable, "-m", "flows.cli", "serve", "sums@champion", "--port", str(port)]
    server = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        body = {"messages": [{"role": "user", "content": "What is 1 plus 1?"}], "max_tokens": 4}
        told = asked(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
    finally:
        stop(server)
    assert server.stdout is not None
    shown = server.stdout.read().decode()
    target = find_target("sums@champion")
    answering = Answering(target.model.path, target.adapter)
    chat = [{"role": "user", "content": "What is 1 plus 1?"}]
    expected = "".join(piece.text for piece in answering.stream(chat, Sampling(max_tokens=4)))
    assert told["choices"][0]["message"]["content"] == expected
    assert f"http://127.0.0.1:{port}/v1" in shown
    assert "curl http" in shown
