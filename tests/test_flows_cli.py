"""The command: wrong input is explained in a line and exits with 2; the rest exits as it says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import app, run
from tasks.errors import InputError
from tasks.home import CHECKOUT
from tasks.models.folder import ModelFolder

HELP = subprocess.run(
    [sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, cwd=CHECKOUT
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty rows, of which the seventh may be spoilt."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}+1", "completion": str(n + 1)}) + "\n" for n in range(40))
    )
    return path


def config(folder: Path, model: ModelFolder, rows: Path, **train: object) -> Path:
    path = folder / "config.yaml"
    settings = {"model": {"source": str(model.path)}, "data": {"source": str(rows)}, "train": train}
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(list(arguments)) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return " ".join(told.split())


def test_help_names_every_verb_in_its_group() -> None:
    assert HELP.returncode == 0
    groups = {
        "Start": "quickstart doctor show",
        "Data": "inspect prepare",
        "Train": "finetune resume search",
        "Look": "compare evaluate ab harness ui",
        "Ship": "models promote rollback export chat generate serve",
        "Operate": "schedule up down",
    }
    for verb in " ".join(groups.values()).split():
        assert f" {verb} " in HELP.stdout
    places = [HELP.stdout.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "none.yaml"], "none.yaml: no such file"),
        (["show", "flows/configs/quickstart.yaml", "train.rnk=1"], "did you mean 'train.rank'?"),
        (["quickstart", "data.source=none.jsonl"], "none.jsonl"),
        (["quickstart", "model.source=./none.gguf"], "none.gguf"),
        (["quickstart", "model.source=some/folder/that/is/not"], "some/folder/that/is/not"),
        (["resume"], "RUN"),
        (["search", "flows/configs/search.yaml", "--budget", "lots"], "budget 'lots'"),
        (["search", "flows/configs/search.yaml", "--trials", "0"], "search.trials = 0"),
        (["search", "flows/configs/search.yaml", "--trials", "many"], "many"),
        (["schedule", "flows/configs/quickstart.yaml", "--cron", "nightly"], "cron 'nightly'"),
        (["schedule", "flows/configs/quickstart.yaml"], "--cron"),
        (["finetun", "x.yaml"], 'Did you mean "finetune"?'),
    ],
)
def test_wrong_input_is_named_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    assert message in failure(capsys, *arguments)
    assert not (home / "mlflow.db").exists(), "nothing was begun"


@pytest.mark.usefixtures("prefect_harness")
def test_a_bad_row_is_named_with_its_line_and_nothing_is_published(
    rows: Path, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    lines = rows.read_text().splitlines()
    lines[6] = '{"prompt": "7+1", "completion": '
    rows.write_text("\n".join(lines))
    told = failure(capsys, "finetune", str(config(tmp_path, tiny_model, rows)))
    assert f"{rows}" in told
    assert "line 7" in told
    assert not list((home / "steps").rglob("*.json*"))


@pytest.mark.usefixtures("prefect_harness")
def test_debug_raises_what_is_otherwise_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        run(["show", str(tmp_path / "none.yaml")], debug=True)


def test_an_unexpected_error_is_one_line_that_names_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.tables

    def fail(*_: object) -> None:
        raise RuntimeError("the disk is on fire\nline 2")

    monkeypatch.setattr(flows.tables, "print_settings", fail)
    told = failure(capsys, "show", code=1)
    assert told == "tunesmith: RuntimeError: the disk is on fire (--debug shows where)"


@pytest.mark.usefixtures("prefect_harness")
def test_a_run_prints_its_figures_and_where_everything_is(
    rows: Path, tmp_path: Path, tiny_model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, tiny_model, rows, num_layers=2, max_steps=3)
    assert run(["finetune", str(path)]) == 0
    told = capsys.readouterr().err
    for what in (
        "val loss",
        "test perplexity",
        "peak memory",
        "adapter",
        "report",
        "tunesmith ui",
        "3 steps",
    ):
        assert what in told
    assert run(["finetune", str(path)]) == 0
    assert "reused, because nothing they depend on has changed: prepare, train" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_cleanly(
    number: signal.Signals, code: int, rows: Path, tmp_path: Path, tiny_model: ModelFolder, home: Path
) -> None:
    path = config(tmp_path, tiny_model, rows, num_layers=2, epochs=100_000, steps_per_eval=100_000)
    # A shell's background job ignores Ctrl-C; the process tested must not inherit that.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import flows.cli as c"
    command = [sys.executable, "-c", f"{program}; c.main()", "finetune", str(path)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(home.glob("steps/train/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert list(home.glob("steps/train/*")) == [], "no half-written adapter"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    [stored] = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    assert stored.info.status == "KILLED"


def test_every_verb_has_a_help_line() -> None:
    assert all(command.help for command in app.subapps)


@pytest.mark.parametrize(
    ("verb", "meanings"),
    [
        ("inspect", ("model.source", "as a page", "as JSON")),
        ("prepare", ("model.source", "put a copy here")),
        ("search", ("how many to train", "memory for one trial")),
        ("schedule", ("two o'clock every night", "Europe/Berlin")),
    ],
)
def test_the_help_of_a_verb_says_what_its_options_mean(
    verb: str, meanings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([verb, "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(meaning in told for meaning in meanings)
