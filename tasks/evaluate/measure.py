"""What one model, base or tuned, does on the test rows; measured once for equal inputs.

The parts have outputs of their own, so that another metric needs no new answers, another length of the
answers no new losses, and runs that share a base, or a base and its data, share what was measured on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.config import EvaluateSettings, TrainSettings
from tasks.errors import InputError
from tasks.models.fingerprints import file_digest
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import load_rows, load_template
from tasks.prepare.splits import TokenRows, load_splits
from tasks.publish import WHOLE, StepOutput, code_version, fingerprint, run_step, write_json

if TYPE_CHECKING:
    from tasks.models.load import LoadedModel

EVALUATION_FILE = "evaluation.json"
PART_FILE = "part.json"

WRITING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "batch_size")
"""Settings that play a part in writing answers; the others judge them."""

TEST = ("test",)


@dataclass(frozen=True)
class Pair:
    """A base and an adapter that are measured beside each other: layers equal in both are computed once.

    Attributes:
        adapter: its folder.
        train: `frozen_prefix` says whether that is wanted, `prefix_cache_gb` how much disk it may take.
    """

    adapter: Path
    train: TrainSettings


def measure(
    settings: EvaluateSettings,
    model: ModelFolder,
    adapter: StepOutput | None,
    data: StepOutput,
    splits: Sequence[str] = TEST,
    pair: Pair | None = None,
) -> StepOutput:
    """What a model with an adapter, or the base alone (None), does on rows of prepared data.

    The output's `evaluation.json` holds, over all rows of `splits`, `test_loss` (nats a supervised token),
    `perplexity`, `token_accuracy`, and `rows` with `nll`, `correct` and `tokens` of each. With
    `general_rows` it holds `general_loss`, and `general` with the `rows` of that and what `texts` they are
    of. With `samples`, where there are chats, it holds `answers` to the last questions of the first of
    them: prompt, reference, answer, its `tokens`, `seconds` and scores; the means of the scores; `bleu` of
    all answers together; `cut_off` (share of answers that were too long), `answer_tokens`, `latency_s`
    (means) and `tokens_per_second`.

    Args:
        data: prepared with this model's tokenizer.
        splits: whose rows are measured, together.
        pair: this model and another one. It changes no figure but by rounding.

    Raises:
        InputError: a metric of `settings.metrics` cannot be used.
    """
    from tasks.evaluate.custom_metrics import files_of

    subject = _Subject(model, adapter.path if adapter else None, data, tuple(splits), pair)
    inputs = {
        "part": WHOLE,
        **subject.inputs,
        "settings": settings.model_dump(mode="json", exclude={"metrics", "judge"}),
        "metrics": [
            (file_digest(file), one.rpartition(":")[2])
            for file, one in zip(files_of(settings.metrics), settings.metrics, strict=True)
        ],
    }

    return run_step("evaluate", inputs, lambda draft: _measure(draft, settings, subject))


def answer_scores(
    settings: EvaluateSettings, model: ModelFolder, adapter: Path, data: StepOutput, split: str
) -> dict[str, float]:
    """Means of the scores of an adapter's answers to the first `settings.samples` questions of a split.

    Raises:
        InputError: no row of the split is a question that is answered in words.
    """
    subject = _Subject(model, adapter, data, (split,))
    chats = _chats(data.path, subject.splits, settings.samples)
    if not chats:
        raise InputError(f"no row of {split} asks and is answered in words: there is nothing to score")
    figures = _scored(chats, _answers(settings, subject, chats), settings, {})
    return {name: float(value) for name, value in figures.items() if name != "answers"}


@dataclass(frozen=True)
class _Subject:
    """A model and the rows it is measured on."""

    model: ModelFolder
    adapter: Path | None
    prepared: StepOutput
    splits: tuple[str, ...]
    pair: Pair | None = None

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every part depends on."""
        return {
            "model": self.model.fingerprint,
            "adapter": adapter_digest(self.adapter) if self.adapter else None,
            "data": self.prepared.fingerprint,
            "splits": list(self.splits),
            "code": {step: code_version(step) for step in ("train", "models")},
        }

    @property
    def data(self) -> Path:
        """The folder of the prepared rows."""
        return self.prepared.path

    @property
    def name(self) -> str:
        """In a progress bar."""
        return "tuned" if self.adapter else "base"

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, loaded when it is first asked for: often all parts are there."""
        return _load(self.model.path, self.adapter, load_template(self.data))

    def frozen(self, rows: TokenRows) -> AbstractContextManager[TokenRows]:
        """The same rows with what the layers that two models share give for them."""
        from tasks.train.adapters import read_adapter_config
        from tasks.train.frozen_prefix import base_identity, for_measuring, untouched_layers

        if self.pair is None:
            return nullcontext(rows)
        network = self.loaded.model
        depth = untouched_layers(read_adapter_config(self.pair.adapter), len(network.layers))
        return for_measuring(network, rows, depth, self.pair.train, base_identity(self.model))


def adapter_digest(folder: Path) -> str:
    """The fingerprint of an adapter's contents, wherever it lies and however it was made."""
    names = ("adapter_config.json", "adapters.safetensors")
    return fingerprint({name: file_digest(folder / name) for name in names})


def _measure(draft: Path, settings: EvaluateSettings, subject: _Subject) -> None:
    from tasks.evaluate.custom_metrics import load_metrics

    metrics = load_metrics(settings.metrics)  # before the work: a person's file may have a fault
    losses = _losses(settings, subject)
    figures = {"test_loss": losses.pop("loss"), **losses}
    if settings.general_rows and (general := _general(settings, subject)):
        figures |= {"general_loss": general.pop("loss"), "general": general}
    if chats := _chats(subject.data, subject.splits, settings.samples):
        figures |= _scored(chats, _answers(settings, subject, chats), settings, metrics)
    write_json(draft / EVALUATION_FILE, figures)


def _losses(settings: EvaluateSettings, subject: _Subject) -> dict[str, Any]:
    from tasks.evaluate.losses import measure_losses

    def make() -> dict[str, Any]:
        prepared = load_splits(subject.data)
        with subject.frozen(_together([prepared[split] for split in subject.splits])) as rows:
            title = f"test loss, {subject.name}"
            return measure_losses(subject.loaded.model, rows, settings.batch_size, title)

    return _part({"part": "losses", **subject.inputs, "batch_size": settings.batch_size}, make)


def _general(settings: EvaluateSettings, subject: _Subject) -> dict[str, Any]:
    """The loss on general texts; empty where there are none. The same texts are the same part of any data."""
    from tasks.evaluate.general import general_rows, general_texts
    from tasks.evaluate.losses import measure_losses

    texts = general_texts(settings.general_rows, subject.data)
    if not texts:
        return {}

    def make() -> dict[str, Any]:
        loaded = subject.loaded
        rows = general_rows(texts, loaded.tokenizer)
        return measure_losses(loaded.model, rows, settings.batch_size, f"general loss, {subject.name}")

    inputs = {key: subject.inputs[key] for key in ("model", "adapter", "code")}
    inputs |= {"part": "general", "texts": fingerprint(texts), "batch_size": settings.batch_size}
    measured = _part(inputs, make)
    return {"loss": measured["loss"], "texts": inputs["texts"], "rows": measured["rows"]}


def _answers(
    settings: EvaluateSettings, subject: _Subject, chats: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The answers to the last questions of some chats, not scored yet."""
    from tasks.evaluate.generation import answer_prompts
    from tasks.prepare.tokenise import encode_prompt

    def make() -> dict[str, Any]:
        loaded, template = subject.loaded, load_template(subject.data)
        prompts = [
            encode_prompt(loaded.tokenizer, chat["messages"], chat.get("tools"), template) for chat in chats
        ]
        written = answer_prompts(loaded, prompts, settings, f"answers, {subject.name}")
        return {
            "tokens_per_second": written.tokens_per_second,
            "answers": [
                {
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "seconds": answer.seconds,
                    "finished": answer.finished,
                }
                for answer in written.answers
            ],
        }

    how = settings.model_dump(mode="json", include=set(WRITING))
    if settings.temperature == 0:
        how.pop("seed")  # nothing is drawn
    return _part({"part": "answers", **subject.inputs, "samples": len(chats), "settings": how}, make)


def _scored(
    chats: Sequence[dict[str, Any]],
    written: Mapping[str, Any],
    settings: EvaluateSettings,
    metrics: Mapping[str, Callable[[str, str, str], float]],
) -> dict[str, Any]:
    from tasks.evaluate.custom_metrics import custom_scores
    from tasks.evaluate.text_metrics import bleu_counts, corpus_bleu, row_scores

    table: list[dict[str, Any]] = []
    names: list[str] = []
    for chat, answer in zip(chats, written["answers"], strict=True):
        prompt, reference = last_exchange(chat)
        scores = row_scores(answer["text"], reference, settings.format)
        scores |= custom_scores(metrics, answer["text"], reference, prompt)
        names = list(scores)
        table.append(
            {
                "prompt": prompt,
                "reference": reference,
                "answer": answer["text"],
                "tokens": answer["tokens"],
                "seconds": answer["seconds"],
                "finished": answer["finished"],
                **scores,
                "bleu_counts": bleu_counts(answer["text"], reference),
            }
        )
    means = {name: _mean(row[name] for row in table) for name in names}
    chrf = {"chrf": means.pop("chrf"), "rouge_l": means.pop("rouge_l")}
    return {
        **chrf,
        "bleu": corpus_bleu(np.sum([row["bleu_counts"] for row in table], axis=0)),
        **means,
        "cut_off": _mean(float(not row["finished"]) for row in table),
        "answer_tokens": _mean(row["tokens"] for row in table),
        "latency_s": _mean(row["seconds"] for row in table),
        "tokens_per_second": written["tokens_per_second"],
        "answers": table,
    }


def last_exchange(chat: dict[str, Any]) -> tuple[str, str]:
    """The turn before the last answer, and that answer."""
    turns = chat["messages"]
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[last - 1]["content"] if last else "", turns[last]["content"]


def _chats(data: Path, splits: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The first rows that ask and are answered in words; texts have no question, tool calls no words."""
    rows = (row for split in splits for row in load_rows(data, split))
    return list(islice((row for row in rows if "text" not in row and last_exchange(row)[1]), count))


def _load(model: Path, adapter: Path | None, template: str | None) -> LoadedModel:
    from tasks.evaluate.generation import end_turn_at
    from tasks.models.load import load_model
    from tasks.train.adapters import load_adapter

    loaded = load_model(model)
    if adapter:
        load_adapter(loaded.model, adapter)
    end_turn_at(loaded.tokenizer, template)
    return loaded


def _part(inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of a measurement, made once for equal inputs."""
    output = run_step("evaluate", inputs, lambda draft: write_json(draft / PART_FILE, make()))
    part: dict[str, Any] = output.read_json(PART_FILE)
    return part


def _together(parts: Sequence[TokenRows]) -> TokenRows:
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([rows.lengths for rows in parts])
    return TokenRows(
        tokens=np.concatenate([rows.tokens for rows in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        supervised=np.concatenate([rows.supervised for rows in parts]),
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
