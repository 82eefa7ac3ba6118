"""A model card: a head that the hub reads, the run's figures, and nothing of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.config import ModelSettings
from tasks.export.card import Subject, Use, figures, front_matter, plain, write_card
from tasks.models.folder import ModelFolder
from tasks.models.origin import Origin, find_origin, read_front_matter

METRICS = {
    "base/test_loss": 3.0,
    "test/test_loss": 2.5,
    "change/test_loss": -0.5,
    "change/test_loss_low": -0.61,
    "change/test_loss_high": -0.39,
    "base/chrf": 10.0,
    "test/chrf": 20.0,
    "base/tokens_per_second": 9.0,
    "test/tokens_per_second": 9.0,
    "test/only_tuned": 1.0,
    "val_loss": 2.0,
}


def subject_of(**changes: Any) -> Subject:
    given: dict[str, Any] = {
        "title": "a run",
        "what": "LoRA adapter",
        "library": "peft",
        "relation": "adapter",
        "base": "Tiny-1B",
        "origin": Origin("owner/Tiny-1B", {"license": "apache-2.0"}),
        "uses": [Use("With PEFT:", "python", "print(1)")],
        "metrics": METRICS,
        "test_rows": 1234,
        "data": {"source": "rows.jsonl", "rows": "10 train"},
        "training": {"rank": 8},
        "datasets": ["owner/rows"],
        "tags": ["lora"],
    }
    return Subject(**{**given, **changes})


def card_of(folder: Path, subject: Subject) -> str:
    write_card(folder, subject)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_its_head(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(card_of(tmp_path, subject_of()))
    data = card.data.to_dict()
    assert data == {
        "base_model": "owner/Tiny-1B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["owner/rows"],
        "tags": ["mlx", "tunesmith", "lora"],
    }
    assert card.text.lstrip().startswith("# a run\n")


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    bare = subject_of(origin=Origin(None, {}), metrics={}, data={}, training={}, datasets=[], tags=[])
    assert front_matter(bare) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "tunesmith"],
    }
    card = card_of(tmp_path, bare)
    assert [line for line in card.splitlines() if line.startswith("#")] == ["# a run", "## Use", "## Licence"]
    assert "do not state its licence" in card


def test_figures_stand_side_by_side_with_their_intervals(tmp_path: Path) -> None:
    card = card_of(tmp_path, subject_of())
    assert "On 1,234 test rows" in card
    assert (
        "| loss (nats a token) | 3 | 2.5 | -0.5 [-0.61, -0.39] |\n| chrF (0 to 100) | 10 | 20 | +10 |" in card
    )
    assert [line.label for line in figures(METRICS)] == ["loss (nats a token)", "chrF (0 to 100)"]
    without = {name: value for name, value in METRICS.items() if "change" not in name}
    assert "interval" not in card_of(tmp_path, subject_of(metrics=without))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b\nc", "a\\|b c"),
        ("postgresql://me:secret@host/db", "postgresql://***@host/db"),
        ("from /home/me/rows.jsonl", "from rows.jsonl"),
        ("<script>", "&lt;script>"),
    ],
)
def test_what_is_shown_has_no_markup_password_or_path(value: str, shown: str) -> None:
    assert plain(value) == shown


def test_every_line_of_the_facts_is_made_plain(tmp_path: Path) -> None:
    card = card_of(
        tmp_path,
        subject_of(
            title="run /home/me/x", base="/home/me/b", data={"a": "/home/me/c"}, training={"b": "/home/me/d"}
        ),
    )
    assert "/home" not in card


@pytest.mark.real
def test_the_bundled_models_origin_is_known_by_its_files() -> None:
    settings = ModelSettings()
    origin = find_origin(ModelFolder(Path("any"), "SmolLM2-135M-Instruct", "x", settings.source, settings))
    assert origin == Origin("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})


def test_a_gguf_file_names_its_page_and_licence(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_license("mit")
    writer.add_repo_url("some/where/owner/Some-1B/")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = find_origin(ModelFolder(tmp_path, "x", "x", str(path)))
    assert found == Origin("owner/Some-1B", {"license": "mit"})


def test_a_models_licence_is_that_of_its_card(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--Some-1B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    card = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\ntags: [x]\n---\n# Some\n"
    (folder / "README.md").write_text(card)
    named = {"license": "other", "license_name": "some-licence", "license_link": "LICENSE"}
    assert find_origin(ModelFolder(folder, "x", "x", str(folder))) == Origin("owner/Some-1B", named)
    assert find_origin(ModelFolder(folder, "x", "x", "owner/Some-1B")) == Origin("owner/Some-1B", named)
    assert find_origin(ModelFolder(tmp_path, "x", "x", str(tmp_path))) == Origin(None, {})


@pytest.mark.parametrize("text", ["", "# no head", "---\n: [\n---\n", "---\njust words\n---\n"])
def test_a_card_without_a_head_says_nothing(text: str) -> None:
    assert read_front_matter(text) == {}
