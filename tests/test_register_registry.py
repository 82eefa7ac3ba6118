"""@champion moves only to what is better on the same test rows by more than chance, and back on request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tasks.config import Settings, TrackingSettings
from tasks.errors import InputError, StepError
from tasks.evaluate.measure import EVALUATION_FILE
from tasks.evaluate.side_by_side import Evaluation
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, write_json
from tasks.register import registry
from tasks.register.champion import promote, registry_lock, roll_back
from tasks.register.registry import Candidate, Registration, register_adapter, registry_name
from tasks.register.versions import find_version, registered_versions
from tasks.tracking import mlflow_run
from tasks.train.use import write_use

pytestmark = pytest.mark.usefixtures("store")

NAME = "tiny-sums"
HERE = TrackingSettings()


class Registry:
    """Registers adapters whose test losses are given, on data whose name is given."""

    def __init__(self, folder: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.model = model
        self.losses: dict[tuple[str, str], float] = {}
        self.measured: list[str] = []
        monkeypatch.setattr(registry, "measure", self._measure)

    def add(
        self, adapter: str, loss: float, data: str = "data", rows: int = 0, **settings: object
    ) -> Registration:
        """Register one: its loss is `loss` on `data`, with so many `rows`, half of them worse than others."""
        self.losses[adapter, data] = loss
        made = self._output(adapter)
        write_json(made.path / "adapters.safetensors", adapter)
        prepared = self._output(data)
        write_use(made.path, self.model, prepared)
        base, tuned = self._evaluation("base", 3.0, rows), self._evaluation(adapter, loss, rows)
        wanted = Settings.model_validate({"register": {"name": NAME, **settings}})
        with mlflow_run(wanted, adapter, {"prefect.flow_run_id": f"flow-{adapter}"}) as run:
            run.log_files(made.path, "adapter")
            evaluation = Evaluation(base, tuned, data)
            return register_adapter(wanted, NAME, Candidate(self.model, made, prepared, evaluation), run)

    def _output(self, name: str) -> StepOutput:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return StepOutput(path, name, False, 0.0)

    def _evaluation(self, name: str, loss: float, rows: int = 0) -> StepOutput:
        output = self._output(f"evaluation-{name}-{loss}-{rows}")
        noise = [0.5 * (-1) ** row * (name != "base") for row in range(rows)]
        figures = {"test_loss": loss, "rows": [{"nll": 10 * (loss + add), "tokens": 10} for add in noise]}
        write_json(output.path / EVALUATION_FILE, figures)
        return output

    def _measure(
        self, settings: object, model: ModelFolder, adapter: StepOutput, data: StepOutput
    ) -> StepOutput:
        self.measured.append(f"{adapter.fingerprint} on {data.fingerprint}")
        assert (adapter.path / "adapters.safetensors").is_file()
        return self._evaluation(adapter.fingerprint, self.losses[adapter.fingerprint, data.fingerprint])


@pytest.fixture
def runs(tmp_path: Path, tiny_model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, tiny_model, monkeypatch)


@pytest.fixture
def client(store: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{store}")


def holders(client: MlflowClient) -> dict[str, str]:
    return {alias: str(of) for alias, of in client.get_registered_model(NAME).aliases.items()}


def test_of_three_runs_the_best_is_champion_and_going_back_returns_to_the_one_before(
    runs: Registry, client: MlflowClient
) -> None:
    first, worse, better = runs.add("a", 2.0), runs.add("b", 2.5), runs.add("c", 1.5)
    assert (first.version, first.champion) == ("1", True)
    assert (worse.version, worse.champion) == ("2", False)
    assert worse.reason.startswith("test_loss 2.5000 against 2.0000 of version 1, which is not better")
    assert (better.version, better.champion) == ("3", True)
    assert holders(client) == {"challenger": "3", "champion": "3"}

    went = roll_back(HERE, NAME)
    assert (went.before, went.now) == (3, 1)
    assert holders(client)["champion"] == "1"
    with pytest.raises(InputError, match=r"version 1 is its first @champion.*tunesmith promote tiny-sums"):
        roll_back(HERE, NAME)

    went = promote(HERE, NAME, 2)
    assert (went.before, went.now) == (1, 2)
    assert roll_back(HERE, NAME).now == 1


def test_going_back_twice_passes_over_versions_that_were_deleted(
    runs: Registry, client: MlflowClient
) -> None:
    for adapter, loss in (("a", 2.5), ("b", 2.0), ("c", 1.5), ("d", 1.0)):
        assert runs.add(adapter, loss).champion
    client.delete_model_version(NAME, "3")
    assert roll_back(HERE, NAME).now == 2
    assert roll_back(HERE, NAME).now == 1


def test_what_a_person_went_back_from_is_not_promoted_by_the_next_equal_run(
    runs: Registry, client: MlflowClient
) -> None:
    runs.add("a", 2.0)
    runs.add("b", 1.5)
    roll_back(HERE, NAME)
    again = runs.add("b", 1.5)
    assert (again.version, again.reused, again.champion) == ("2", True, False)
    assert "until a person went back" in again.reason
    promote(HERE, NAME, 2)
    assert holders(client)["champion"] == "2"
    assert runs.add("b", 1.5).champion


def test_a_first_version_that_is_worse_than_the_base_is_no_champion(runs: Registry) -> None:
    told = runs.add("a", 3.5)
    assert not told.champion
    assert "test_loss 3.5000 against 3.0000 of the base model" in told.reason


def test_a_gain_within_chance_moves_nothing_and_one_beyond_it_does(runs: Registry) -> None:
    """Rows differ from the base's by ±0.5: sixteen of them do not tell 0.1, but 1.0."""
    chance = runs.add("a", 2.9, rows=16)
    assert not chance.champion
    assert "not beyond chance" in chance.reason
    assert runs.add("b", 2.0, rows=16).champion


def test_a_champion_of_other_test_rows_is_measured_on_these(runs: Registry) -> None:
    runs.add("a", 2.0, data="old")
    runs.losses["a", "new"] = 1.2
    told = runs.add("b", 1.5, data="new")
    assert runs.measured == ["a on new"]
    assert not told.champion
    assert "against 1.2000 of version 1" in told.reason


def test_a_champion_that_cannot_be_measured_stays_and_the_reason_is_told(
    runs: Registry, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    runs.add("a", 2.0)
    client.delete_model_version_tag(NAME, "1", "adapter")
    told = runs.add("b", 1.0)
    assert not told.champion
    assert "cannot be measured" in told.reason
    assert "was not registered by a run of Tunesmith" in caplog.text


@pytest.mark.parametrize(("policy", "champion"), [("always", True), ("never", False)])
def test_the_policy_can_be_always_or_never(runs: Registry, policy: str, champion: bool) -> None:
    runs.add("a", 2.0)
    assert runs.add("b", 2.5, promote=policy).champion is champion


def test_a_figure_that_was_not_measured_decides_nothing_and_is_named(runs: Registry) -> None:
    told = runs.add("a", 2.0, metric="chrf")
    assert not told.champion
    assert told.reason == "register.metric = 'chrf' was not measured; there are test_loss"


def test_the_same_adapter_is_one_version(runs: Registry) -> None:
    first, again = runs.add("a", 2.0), runs.add("a", 2.0)
    assert (first.reused, again.reused) == (False, True)
    assert first.version == again.version == "1"
    assert again.champion


def test_a_version_names_what_it_came_from_and_its_figures(runs: Registry, tiny_model: ModelFolder) -> None:
    runs.add("a", 2.0)
    version = find_version(HERE, NAME, "champion")
    assert version.figures == {"test_loss": 2.0}
    assert version.tags["adapter"] == "a"
    assert version.tags["base_fingerprint"] == tiny_model.fingerprint
    assert version.tags["data_fingerprint"] == "data"
    assert version.tags["mlflow.run_id"] == version.run_id
    assert version.tags["prefect.flow_run_id"] == "flow-a"


def test_a_store_that_fails_in_the_middle_leaves_no_half_version_and_the_next_try_is_whole(
    runs: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MlflowException("the server is gone")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "create_model_version", fail)
        with pytest.raises(StepError, match=r"the server is gone.*the same command takes them from there"):
            runs.add("a", 2.0)
    assert registered_versions(HERE, NAME) == []
    told = runs.add("a", 2.0)
    assert (told.version, told.champion, told.reused) == ("1", True, False)


@pytest.mark.parametrize(
    ("which", "message"),
    [("7", "has no version 7; it has 1 @challenger @champion"), ("best", "has no @best")],
)
def test_a_version_that_is_not_there_is_named_beside_those_that_are(
    runs: Registry, which: str, message: str
) -> None:
    runs.add("a", 2.0)
    with pytest.raises(InputError, match=message):
        find_version(HERE, NAME, which)
    with pytest.raises(InputError, match="no registered model 'other'; there are tiny-sums"):
        registered_versions(HERE, "other")


def test_two_processes_do_not_judge_and_move_at_once(runs: Registry) -> None:
    runs.add("a", 2.0)
    runs.add("b", 1.5)
    with ThreadPoolExecutor(1) as pool, registry_lock():
        moving = pool.submit(roll_back, HERE, NAME)
        with pytest.raises(TimeoutError):
            moving.result(timeout=2)
        assert find_version(HERE, NAME, "champion").number == 2
    assert moving.result().now == 1


def test_names_become_what_mlflow_allows() -> None:
    assert registry_name("org/model: v1") == "org-model-v1"
