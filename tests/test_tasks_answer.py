"""Answers: what is given to the model is what stood before an answer in training; text arrives in pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from tasks.answer import Answering, Piece, Sampling
from tasks.config import Settings
from tasks.errors import InputError
from tasks.models.folder import ModelFolder
from tasks.models.load import load_model
from tasks.prepare.rows import Messages
from tasks.prepare.tokenise import ChatEncoder, load_tokenizer
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, save_adapter

CHAT: Messages = [{"role": "user", "content": "What is 2 + 2?"}]
SHORT = Sampling(max_tokens=12)


def text(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def answering(tiny_model: ModelFolder) -> Answering:
    return Answering(tiny_model.path)


def test_a_greedy_answer_is_that_of_mlx_lm_for_the_rendered_prompt(
    answering: Answering, tiny_model: ModelFolder
) -> None:
    from mlx_lm import generate

    loaded = load_model(tiny_model.path)
    prompt = loaded.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    expected = generate(loaded.model, loaded.tokenizer, prompt, max_tokens=12)
    pieces = [*answering.stream(CHAT, SHORT)]
    assert "".join(piece.text for piece in pieces) == expected
    assert [piece.ended_by for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert (pieces[-1].ended_by, pieces[-1].tokens) == ("length", 12)


def test_a_chat_that_goes_on_is_answered_as_if_it_were_read_anew(tiny_model: ModelFolder) -> None:
    kept = Answering(tiny_model.path)
    chat = CHAT
    for question in ("And 3 + 3?", "And\n4 + 4?", "🎈?"):
        answer = text(kept.stream(chat, SHORT))
        assert answer == text(Answering(tiny_model.path).stream(chat, SHORT))
        chat = [*chat, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        assert len(kept._cached) > 20, "the next turn is read from here on"
    other: Messages = [{"role": "user", "content": "Else?"}]
    assert text(kept.stream(other, SHORT)) == text(Answering(tiny_model.path).stream(other, SHORT))


def test_an_answer_cut_short_does_not_spoil_the_next(answering: Answering, tiny_model: ModelFolder) -> None:
    started = answering.stream(CHAT, SHORT)
    next(started)
    started.close()  # type: ignore[attr-defined]
    assert text(answering.stream(CHAT, SHORT)) == text(Answering(tiny_model.path).stream(CHAT, SHORT))


def test_the_prompt_is_what_stood_before_the_answer_in_training(tiny_model: ModelFolder) -> None:
    template = "{% for m in messages %}{{ m.role + '=' + m.content + '<|im_end|>' }}{% endfor %}"
    answering = Answering(tiny_model.path, template=template, system_prompt="Be brief.")
    chat: Messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    encoder = ChatEncoder(load_tokenizer(tiny_model.path), template)
    [(ids, supervised)] = encoder.rows([[*chat, {"role": "assistant", "content": "4"}]])
    assert answering.prompt_ids(CHAT) == ids[: supervised.index(True)]
    assert answering.prompt_ids([{"role": "system", "content": "Rhyme."}, *CHAT]) != ids
    assert encoder.decode(answering.prompt_ids(CHAT)).startswith("system=Be brief.<|im_end|>user=")


def test_a_control_token_in_a_question_stays_text(answering: Answering) -> None:
    ids = answering.prompt_ids([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(2) == 1, "only the one that the template writes"


def test_an_answer_ends_where_the_template_ends_a_turn(tiny_model: ModelFolder) -> None:
    """The tokenizer's own end of text is <|im_end|>, that of this template <|endoftext|>, id 0."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    answering = Answering(tiny_model.path, template=template)
    assert {0, 2} <= set(answering._tokenizer.eos_token_ids)


def test_an_adapter_changes_the_answer(tiny_model: ModelFolder, tmp_path: Path) -> None:
    network = load_model(tiny_model.path).model
    config = adapter_config(Settings().train.model_copy(update={"num_layers": 4}), 4)
    add_adapter(network, config, 0)
    weights = {name: mx.random.normal(array.shape) for name, array in adapter_weights(network).items()}
    save_adapter(tmp_path, weights, config)
    assert text(Answering(tiny_model.path, tmp_path).stream(CHAT, SHORT)) != text(
        Answering(tiny_model.path).stream(CHAT, SHORT)
    )


def test_a_soft_prompt_stands_in_front(tiny_model: ModelFolder, tmp_path: Path) -> None:
    network = load_model(tiny_model.path).model
    config = {"fine_tune_type": "soft-prompt", "prompt_tokens": 3}
    add_adapter(network, config, 0)
    save_adapter(tmp_path, adapter_weights(network), config)
    answering = Answering(tiny_model.path, tmp_path)
    assert answering.prompt_ids(CHAT)[:3] == [320, 321, 322]
    assert len(text(answering.stream(CHAT, SHORT))) > 0


def test_a_chat_longer_than_the_model_reads_is_refused_and_one_near_it_cut(
    tiny_model: ModelFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    answering = Answering(folder)
    with pytest.raises(InputError, match="the model reads 40"):
        next(answering.stream([{"role": "user", "content": "x" * 40}], SHORT))
    length = len(answering.prompt_ids(CHAT))
    assert 28 < length < 40
    assert [*answering.stream(CHAT, SHORT)][-1].tokens == 40 - length


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_sampling_draws_and_greedy_does_not(answering: Answering) -> None:
    warm = Sampling(max_tokens=12, temperature=1.5, top_p=0.9)
    assert len({text(answering.stream(CHAT, warm)) for _ in range(4)}) > 1
    assert len({text(answering.stream(CHAT, SHORT)) for _ in range(3)}) == 1


@pytest.mark.parametrize("chat", [[], [*CHAT, {"role": "assistant", "content": "4"}]])
def test_a_chat_without_a_question_is_refused(answering: Answering, chat: Messages) -> None:
    with pytest.raises(InputError, match="nothing to answer"):
        answering.prompt_ids(chat)
