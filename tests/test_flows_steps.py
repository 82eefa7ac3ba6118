"""One setting of each step is changed in turn: exactly the steps downstream of it run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.steps import FOLLOWS, and_what_follows, steps_markdown
from tasks import changes, publish
from tasks.changes import FIRST, why_anew
from tasks.config import Settings, TrackingSettings, load_settings
from tasks.evaluate.side_by_side import evaluate_adapter
from tasks.fuse.merge import fuse_adapter
from tasks.models.folder import ModelFolder
from tasks.prepare.pipeline import prepare_data
from tasks.publish import FORCED, StepOutput, forcing, run_step
from tasks.report.finished import StepDone
from tasks.tracking import Run, connect
from tasks.train.step import train_adapter

ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(30)]

EVERYTHING = {"prepare", "train", "evaluate", "fuse"}


class Chain:
    """A finetune without flow, registry and report, over and over in one home."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        self.model, self.rows = model, folder / "rows.jsonl"
        self.write(ROWS)
        self.settings = load_settings(
            None,
            [
                f"data.source={self.rows}",
                "train.num_layers=1",
                "train.max_steps=1",
                "evaluate.samples=1",
                "evaluate.max_tokens=2",
                "evaluate.general_rows=0",
            ],
        )
        client, uri, experiment = connect(TrackingSettings())
        self._opened = (client, uri, experiment)

    def write(self, rows: list[dict[str, str]]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def changed(self, *overrides: str) -> Settings:
        tree = self.settings.model_dump(mode="json", by_alias=True)
        for override in overrides:
            key, value = override.split("=")
            section, name = key.split(".")
            tree[section][name] = json.loads(value) if value[0] in "[{0123456789" else value
        return Settings.model_validate(tree)

    def run(self, settings: Settings) -> dict[str, str]:
        """The steps that were made, each with why."""
        client, uri, experiment = self._opened
        run = Run(client.create_run(experiment).info.run_id, uri, experiment)
        data = prepare_data(settings.data, self.model, run)
        adapter = train_adapter(settings.train, self.model, data, run)
        evaluation = evaluate_adapter(settings.evaluate, self.model, adapter, data, run, settings.train)
        fused = fuse_adapter(settings.fuse, self.model, adapter, data)
        outputs: dict[str, Any] = {"prepare": data, "train": adapter, "evaluate": evaluation, "fuse": fused}
        return {name: output.why for name, output in outputs.items() if not output.reused}


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory, migrated: Path, tiny_model: ModelFolder
) -> Iterator[Chain]:
    """The chain, run once."""
    home = tmp_path_factory.mktemp("chain")
    shutil.copyfile(migrated, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(home))
        made = Chain(tmp_path_factory.mktemp("rows"), tiny_model)
        assert made.run(made.settings).keys() == EVERYTHING
        yield made


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of the chain where there is one, else one of the test's own."""
    if "chain" not in request.fixturenames:
        monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_nothing_is_made_twice(chain: Chain) -> None:
    assert chain.run(chain.settings) == {}


@pytest.mark.parametrize(
    ("override", "made", "why"),
    [
        ("data.seed=1", EVERYTHING, "data.seed 0 → 1"),
        ("train.rank=4", EVERYTHING - {"prepare"}, "train.rank 8 → 4"),
        ("train.seed=3", EVERYTHING - {"prepare"}, "train.seed 0 → 3"),
        ("evaluate.max_tokens=3", {"evaluate"}, "evaluate.max_tokens 2 → 3"),
        ("evaluate.format=json", {"evaluate"}, "evaluate.format null → json"),
        ("fuse.tolerance=0.01", {"fuse"}, "fuse.tolerance 0.001 → 0.01"),
        ("train.steps_per_save=1", set(), ""),
        ("train.prompt_tokens=9", set(), ""),
        ("train.min_gain=0.5", set(), ""),
        ("train.prefix_cache_gb=3", set(), ""),
        ("register.promote=never", set(), ""),
        ("search.trials=3", set(), ""),
        ("tracking.experiment=other", set(), ""),
    ],
)
def test_a_changed_setting_runs_exactly_what_is_downstream_and_is_named(
    override: str, made: set[str], why: str, chain: Chain
) -> None:
    done = chain.run(chain.changed(override))
    assert done.keys() == made
    if made:
        assert next(iter(done.values())) == why
    assert chain.run(chain.settings) == {}, "what was there before is there still"


def test_a_changed_row_retrains_and_a_moved_file_does_not(chain: Chain, tmp_path: Path) -> None:
    moved = tmp_path / chain.rows.name
    moved.write_bytes(chain.rows.read_bytes())
    assert chain.run(chain.changed(f"data.source={moved}")) == {}
    with moved.open("a") as rows:
        rows.write(json.dumps({"prompt": "What is 99 plus 99?", "completion": "It is 198."}) + "\n")
    done = chain.run(chain.changed(f"data.source={moved}"))
    assert done.keys() == EVERYTHING
    assert done["prepare"] == "the file of data.source has changed"
    assert done["train"] == "other prepared data"


def test_changed_code_of_a_step_is_named(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = publish.code_version
    monkeypatch.setattr(publish, "code_version", lambda step: "new" if step == "fuse" else plain(step))
    assert chain.run(chain.settings) == {"fuse": "Tunesmith's own code of this step has changed"}


def test_a_forced_step_is_made_again_with_all_that_follows(chain: Chain) -> None:
    with forcing(and_what_follows(["train"])):
        assert chain.run(chain.settings) == dict.fromkeys(("train", "evaluate", "fuse"), FORCED)
    with forcing(and_what_follows(["fuse"])):
        assert chain.run(chain.settings) == {"fuse": FORCED}
    assert chain.run(chain.settings) == {}


def test_the_task_of_a_step_for_prefect_is_no_part_of_its_code(tmp_path: Path) -> None:
    entry = Path(publish.__file__).parent / "fuse" / "task.py"
    publish.code_version.cache_clear()
    before, text = publish.code_version("fuse"), entry.read_text()
    folder = tmp_path / "tasks"
    shutil.copytree(entry.parent, folder / "fuse", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "__file__", str(folder / "publish.py"))
        (folder / "fuse" / "task.py").write_text(text + "\n# another time limit\n")
        publish.code_version.cache_clear()
        assert publish.code_version("fuse") == before
        (folder / "fuse" / "merge.py").write_text("another merge")
        publish.code_version.cache_clear()
        assert publish.code_version("fuse") != before
    publish.code_version.cache_clear()


def test_a_forced_output_is_replaced_once_it_is_complete_and_made_once(home: Path) -> None:
    def write(text: str) -> Any:
        return lambda draft: (draft / "text").write_text(text)

    def fail(draft: Path) -> None:
        raise RuntimeError

    first = run_step("train", {"a": 1}, write("first"))
    with forcing({"train"}):
        with pytest.raises(RuntimeError):
            run_step("train", {"a": 1}, fail)
        assert (first.path / "text").read_text() == "first"
        assert run_step("train", {"a": 1}, write("second")).why == FORCED
        assert run_step("train", {"a": 1}, fail).reused
        assert run_step("fuse", {"a": 1}, write("other")).why == FIRST
    assert (first.path / "text").read_text() == "second"
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def outputs(folder: Path, *inputs: dict[str, Any]) -> list[Path]:
    files = []
    for number, known in enumerate(inputs):
        file = folder / f"{number}.json"
        file.write_text(json.dumps(known))
        files.append(file)
    return files


def test_why_is_told_against_the_nearest_output_and_not_the_newest(tmp_path: Path) -> None:
    known = outputs(
        tmp_path,
        {"settings": {"rank": 8, "alpha": 32.0}, "data": "a"},
        {"settings": {"rank": 1, "alpha": 64.0}, "data": "b"},
    )
    new = {"settings": {"rank": 16, "alpha": 32.0}, "data": "a"}
    assert why_anew("train", new, known) == "train.rank 8 → 16"


def test_what_is_no_output_is_passed_over(tmp_path: Path) -> None:
    (torn := tmp_path / "torn.json").write_text('{"settings": ')
    assert why_anew("train", {"settings": {"rank": 1}}, [torn, tmp_path / "gone.json"]) == FIRST


def test_many_changes_are_counted(tmp_path: Path) -> None:
    known = outputs(tmp_path, {"settings": {str(n): 0 for n in range(7)}})
    told = why_anew("train", {"settings": {str(n): 1 for n in range(7)}}, known)
    assert told.count(" → ") == changes.MOST_TOLD
    assert told.endswith(" and 3 more")


def test_what_follows_is_what_a_change_reaches() -> None:
    assert and_what_follows(["prepare"]) == FOLLOWS.keys()
    assert and_what_follows([]) == frozenset()


def test_steps_are_told_in_a_table() -> None:
    told = steps_markdown([StepDone("train", True, 0.2, ""), StepDone("fuse", False, 3.0, "a | b")])
    assert "| train | reused | 0.2 s | nothing it depends on has changed |" in told
    assert "| fuse | made | 3.0 s | a \\| b |" in told


def test_an_output_that_was_found_says_nothing_of_why() -> None:
    assert StepOutput(Path("x"), "x", True, 0.0).why == ""
