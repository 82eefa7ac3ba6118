"""The verbs of shipping: registered models told and moved, prompts answered, a server's command line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flows import model_server
from flows.cli import run
from flows.model_server import announcement, server_arguments
from flows.registered import age
from flows.targets import Target
from tasks.config import ModelSettings, Settings
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.models.resolve import resolve_model
from tasks.publish import StepOutput
from tasks.tracking import mlflow_run
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter
from tasks.train.use import write_use

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def adapter(tiny_model: ModelFolder, tmp_path: Path) -> Path:
    """An adapter of two layers, trained on nothing, that knows its base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    network = load_model(tiny_model.path).model
    config = adapter_config(Settings().train.model_copy(update={"num_layers": 2}), 4)
    add_adapter(network, config, 0)
    save_adapter(folder, adapter_weights(network), config)
    base = resolve_model(ModelSettings(source=str(tiny_model.path)))
    write_use(folder, base, StepOutput(tmp_path, "data", False, 0.0))
    return folder


@pytest.fixture
def versions(adapter: Path, store: Path) -> str:
    """Three versions of "sums", the second of them champion; the id of the run they came from."""
    with mlflow_run(Settings(), "sums-run", {}) as made:
        made.log_files(adapter, "adapter")
        client = made.client
        client.create_registered_model("sums")
        for number, loss in enumerate((2.0, 1.0, 1.5), 1):
            tags = {
                "figure.test_loss": str(loss),
                "figure.chrf": "31.25",
                "base_model": "tiny",
                "adapter": "a",
            }
            client.create_model_version("sums", f"runs:/{made.id}/adapter", made.id, tags=tags)
            client.set_registered_model_alias("sums", "challenger", str(number))
        client.set_registered_model_alias("sums", "champion", "2")
    return made.id


def done(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_models_shows_versions_aliases_figures_runs_and_how_to_use_the_champion(
    versions: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = done(capsys, "models")
    lines = [line.strip() for line in shown.splitlines() if line.strip().startswith("sums ")]
    assert [line.split()[1] for line in lines] == ["3", "2", "1"]
    assert all(word in lines[0] for word in ("@challenger", "1.5000", "31.2", "tiny", versions[:8], "now"))
    assert "@champion" in lines[1]
    assert "tunesmith chat sums@champion" in shown
    assert "mlflow models serve -m models:/sums@champion --env-manager local" in shown


def test_help_names_the_verbs_of_shipping_before_those_of_operating(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = done(capsys, "--help")
    group = shown[shown.index("─ Ship ─") : shown.index("─ Operate ─")]
    assert all(
        f" {verb} " in group for verb in ("models", "promote", "rollback", "chat", "generate", "serve")
    )


def test_models_as_json_tells_everything(versions: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(done(capsys, "models", "sums", "--json"))
    assert [version["version"] for version in told] == [3, 2, 1]
    assert told[1]["aliases"] == ["champion"]
    assert told[1]["figures"] == {"test_loss": 1.0, "chrf": 31.25}
    assert told[1]["tags"] == {"base_model": "tiny", "adapter": "a"}
    assert told[1]["run"] == versions


def test_without_any_models_it_says_what_makes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Nothing is registered yet" in done(capsys, "models")
    assert "no registered model 'sums'" in failure(capsys, "models", "sums")
    assert "no registered model 'sums'" in failure(capsys, "rollback", "sums")


@pytest.mark.usefixtures("versions")
def test_promote_and_rollback_say_from_where_to_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert done(capsys, "promote", "sums", "3") == "sums: @champion goes from version 2 to version 3\n"
    assert done(capsys, "rollback", "sums") == "sums: @champion goes from version 3 to version 2\n"
    assert "rolled back" not in done(capsys, "models", "sums"), "its alias is told, that it is challenger"
    assert "there is none to go back to" in failure(capsys, "rollback", "sums")
    assert "version 2 is @champion already" in failure(capsys, "promote", "sums", "2")
    assert "has no version 9" in failure(capsys, "promote", "sums", "9")


@pytest.mark.usefixtures("versions")
def test_generate_answers_alike_whatever_names_the_adapter(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--max-tokens", "6")
    answer = done(capsys, "generate", str(adapter), "--prompt", "Hello?", *few)
    assert answer.strip()
    for target in ("sums@champion", "sums/1", "sums-run"):
        told = json.loads(done(capsys, "generate", target, "--prompt", "Hello?", "--json", *few))
        assert told["answer"] + "\n" == answer
        assert (told["tokens"], told["ended_by"]) == (6, "length")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n"))
    assert done(capsys, "generate", str(adapter), *few) == answer


@pytest.mark.usefixtures("versions")
def test_chat_takes_the_newest_run_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n/reset\nHello?\n/quit\n"))
    first, *answers = done(capsys, "chat", "--max-tokens", "6").splitlines()
    assert first.startswith("run sums-run (")
    shown = [line for line in answers if "cut at 6 tokens" in line]
    assert len(shown) == 2
    assert shown[0].split("> ")[-1] == shown[1].split("> ")[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "none", "--prompt", "a"], "no run of that id or name"),
        (["generate", "none", "--prompt", ""], "the prompt is empty"),
        (["generate", "none", "--prompt", "a", "--max-tokens", "0"], "max_tokens = 0"),
        (["generate", "none", "--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["chat", "--top-p", "2"], "top_p = 2"),
        (["chat"], "has no finished run with an adapter"),
        (["serve", "sums@champion"], "no registered model 'sums'"),
        (["promote", "sums", "best"], "best"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, *arguments)


def test_generate_waits_for_nobody_at_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert "there is no prompt" in failure(capsys, "generate", "none")


def test_serve_becomes_mlx_lms_server_on_loopback_for_this_page_alone(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))
    shown = done(capsys, "serve", str(adapter), "--port", "47811")
    [(_, command, environment)] = became
    options = dict(zip(command[3::2], command[4::2], strict=True))
    port = options["--port"]
    assert (options["--host"], options["--adapter-path"]) == ("127.0.0.1", str(adapter))
    assert options["--allowed-origins"] == f"http://127.0.0.1:{port}"
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in shown
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(model_server.CHECKOUT)


def test_the_template_and_the_system_prompt_of_the_training_are_told_to_the_server_and_its_users(
    tiny_model: ModelFolder,
) -> None:
    target = Target("it", tiny_model, template="{{ messages }}", system_prompt="It's you.")
    arguments = server_arguments(target, 8080)
    assert arguments[arguments.index("--chat-template") + 1] == "{{ messages }}"
    assert "--adapter-path" not in arguments
    assert '"content": "It\'\\\'\'s you."' in announcement(target, 8080)


def test_a_soft_prompt_is_refused_before_a_server_is_started(
    tiny_model: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load_model(tiny_model.path).model
    config = {"fine_tune_type": "soft-prompt", "prompt_tokens": 2}
    add_adapter(network, config, 0)
    save_adapter(tmp_path, adapter_weights(network), {**config, "model": str(tiny_model.path)})
    assert "knows no soft prompts" in failure(capsys, "serve", str(tmp_path))


def test_ages_are_told_in_the_largest_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    ages = {5: "now", 65: "1 min", 7300: "2 h", 200_000: "2 d", -9: "now"}
    for seconds, told in ages.items():
        assert age(int((1_000_000 - seconds) * 1000)) == told
