"""Settings come from defaults, a YAML file and overrides; every mistake names the key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.config import Settings, changed, describe, flatten, load_settings
from tasks.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "flows" / "configs").glob("*.yaml"))


def test_overrides_lie_over_the_file_which_lies_over_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("train: {rank: 16, alpha: 8}\nregister: {promote: never}\n")
    settings = load_settings(config, ["train.rank=32", "train.learning_rate=3e-4"])
    assert changed(settings) == {
        "train.rank": 32,
        "train.alpha": 8.0,
        "train.learning_rate": 3e-4,
        "register.promote": "never",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_how_to_run_it(config: Path) -> None:
    load_settings(config)
    assert config.read_text().startswith("# tunesmith ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.rnk=3", r"unknown setting 'train.rnk'; did you mean 'train.rank'\?"),
        ("rank=3", r"unknown setting 'rank'; did you mean 'train.rank'\?"),
        ("trian.rank=3", r"unknown setting 'trian'; did you mean 'train'\?"),
        ("zzz=3", "'tunesmith show' lists them all"),
        ("train.rank=0", "train.rank = 0: input should be greater than or equal to 1"),
        ("train.rank=many", "train.rank = 'many': input should be a valid integer"),
        ("train.num_layers=0", "from 1 up, or -1 for all"),
        ("train.schedule=stepwise", "'constant', 'linear' or 'cosine'"),
        ("train.rank", "section.key=value"),
        ("train.rank.x=3", "train.rank"),
        ("search.learning_rate.low=1", r"low \(1\) must be below high \(0.001\)"),
        ("train.rank=[", "not YAML"),
        ("model.quantize.bits=5", r"model.quantize.bits = 5: input should be 2, 3, 4, 6 or 8"),
        ("model.quantize.bit=4", r"unknown setting 'model.quantize.bit'; did you mean 'model.quantize'\?"),
        ("fuse.quantize.bits=5", r"^fuse.quantize.bits = 5: input should be 2, 3, 4, 6 or 8$"),
        ("fuse.quantize=bose", r"^fuse.quantize = 'bose': input should be 'base'$"),
        ("register.name=it's/mine", "register.name"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train:\n  rank: [1\n", r"a.yaml, line 3: not YAML"),
        (b"- a\n- b\n", "holds a list"),
        (b"train: {rank: 8}\n\xff\n", "not UTF-8 at byte 17"),
        (b"train: {rank: 8, rank: 9}\n", "line 1: 'rank' stands twice"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    config = tmp_path / "a.yaml"
    config.write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_settings(config)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.method=full", "model.quantize.bits=4"], "^train.method full cannot train quantised weights"),
        (["train.method=dora", "model.quantize.bits=6"], "^train.method dora needs .* 2, 4, 8"),
        (["train.method=soft-prompt"], "^train.method soft-prompt .* set fuse.enabled=false"),
        (["train.method=full", "train.lora_plus_ratio=4"], "^train: lora_plus_ratio is of lora and dora"),
        (["train.optimizer=adam", "train.weight_decay=0.1"], "^train: adam has no weight_decay"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(None, overrides)


def test_settings_close_to_those_that_do_not_go_together_are_allowed() -> None:
    load_settings(None, ["train.method=dora", "model.quantize.bits=8", "train.lora_plus_ratio=4"])
    load_settings(None, ["train.method=soft-prompt", "fuse.enabled=false", "model.quantize.bits=3"])
    load_settings(None, ["train.method=full", "train.weight_decay=0.1"])


def test_a_quantised_base_is_half_described_by_defaults_and_seen_as_changed() -> None:
    settings = load_settings(None, ["model.quantize.bits=4"])
    assert changed(settings) == {"model.quantize.bits": 4, "model.quantize.group_size": 64}
    assert "model.quantize" in flatten(Settings())


def test_a_source_beside_the_config_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "a.yaml").write_text("data: {source: rows.jsonl}\n")
    monkeypatch.chdir("/")
    assert load_settings(tmp_path / "a.yaml").data.source == str(tmp_path / "rows.jsonl")


def test_settings_survive_the_trip_through_json_that_prefect_makes() -> None:
    settings = load_settings(None, ["train.rank=3", "register.name=x", "search.rank=[1, 2]"])
    assert Settings.model_validate(settings.model_dump(mode="json", by_alias=True)) == settings


def test_passwords_in_addresses_are_not_shown() -> None:
    settings = load_settings(None, ["tracking.uri=postgresql://me:secret@db.example/mlflow"])
    assert settings.tracking.uri == "postgresql://me:secret@db.example/mlflow"
    assert flatten(settings)["tracking.uri"] == "postgresql://***@db.example/mlflow"
    assert flatten(settings)["data.source"] == "stdlib"


def test_descriptions_belong_to_existing_keys() -> None:
    assert describe().keys() <= flatten(Settings()).keys()
