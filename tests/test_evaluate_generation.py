"""Batched answers are those of one prompt at a time, in text, in sampling and in where they end."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_networks import tiny_network

from tasks.config import EvaluateSettings
from tasks.evaluate import generation
from tasks.evaluate.generation import answer_prompts, batching_fault, end_turn_at, sampler
from tasks.models.folder import ModelFolder
from tasks.models.load import LoadedModel, load_model

PROMPTS = [
    np.random.default_rng(length).integers(3, 250, length).tolist() for length in (1, 40, 7, 2, 19, 90, 3)
]


@pytest.fixture(scope="module")
def loaded(tiny_model: ModelFolder) -> LoadedModel:
    """A random network whose greedy answers are no mere repetition, and the tiny model's tokenizer."""
    return LoadedModel(tiny_network("mistral"), load_model(tiny_model.path).tokenizer, {})


def settings(**changes: object) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"max_tokens": 24, "batch_size": 4, **changes})


def written(
    loaded: LoadedModel, prompts: Sequence[list[int]] = PROMPTS, **changes: object
) -> list[list[int]]:
    return [answer.ids for answer in answer_prompts(loaded, prompts, settings(**changes), "").answers]


def alone(loaded: LoadedModel, **how: object) -> list[list[int]]:
    """The tokens that mlx-lm writes for each prompt by itself."""
    answers = []
    for prompt in PROMPTS:
        steps = list(stream_generate(loaded.model, loaded.tokenizer, prompt, max_tokens=24, **how))
        end = -1 if steps[-1].finish_reason == "stop" else None
        answers.append([step.token for step in steps][:end])
    return answers


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_greedy_tokens_are_those_of_mlx_lm_alone(loaded: LoadedModel, batch_size: int) -> None:
    expected = alone(loaded)
    assert written(loaded, batch_size=batch_size) == expected
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    assert max(len(set(answer)) for answer in expected) > 8
    text = answer_prompts(loaded, PROMPTS, settings(), "").answers[0].text
    assert text == loaded.tokenizer.decode(expected[0]).strip()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("llama", ""),
        ("llama-sliding", ""),
        ("qwen3", ""),
        ("gemma3_text", ""),
        ("phi3", ""),
        ("cohere2", ""),
        ("gemma2", "log-probabilities differ"),
        ("mamba", "log-probabilities differ"),
    ],
)
def test_every_family_answers_as_alone_in_a_batch_where_that_changes_nothing(
    loaded: LoadedModel, kind: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Some have windows of 8 tokens, so that the rows of a batch leave theirs at different times.

    Of mlx-lm 0.32.2, gemma2 lays the masks of a batch's rows over its heads, and Mamba's state runs
    through the padding.
    """
    other = LoadedModel(tiny_network(kind), loaded.tokenizer, {})
    assert written(other) == alone(other)
    assert fault in batching_fault(other.model)
    assert ("one by one" in caplog.text) == bool(fault)


def test_a_repetition_penalty_is_that_of_mlx_lm_alone(loaded: LoadedModel) -> None:
    expected = alone(loaded, logits_processors=make_logits_processors(repetition_penalty=1.5))
    assert written(loaded, repetition_penalty=1.5) == expected
    assert expected != written(loaded)


def test_one_by_one_gives_the_same_answers_greedy_and_sampled(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, sampled = written(loaded), written(loaded, temperature=1.0)
    monkeypatch.setattr(generation, "batching_fault", lambda model, in_front: "for the test")
    assert written(loaded) == together
    assert written(loaded, temperature=1.0) == sampled


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(loaded: LoadedModel) -> None:
    how = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    first = written(loaded, **how)
    mx.random.seed(99)
    assert written(loaded, batch_size=2, **how) == first
    assert written(loaded, seed=1, **how) != first
    assert first != written(loaded)
    repeated = written(loaded, prompts=[PROMPTS[1]] * 4, **how)
    assert len({tuple(answer) for answer in repeated}) == 4, "each answer draws for itself"


def test_sampling_keeps_to_the_likeliest_tokens() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    log_probabilities = mx.array(np.log(probabilities)[None])

    def drawn(**how: object) -> np.ndarray:
        draw = sampler(settings(temperature=1.0, **how), row=0)
        return np.bincount([draw(log_probabilities).item() for _ in range(400)], minlength=4) / 400

    assert drawn() == pytest.approx(probabilities, abs=0.1)
    assert drawn(top_k=2)[2:].sum() == 0
    assert drawn(top_p=0.7)[2:].sum() == 0
    assert drawn(top_p=0.7)[1] > 0
    assert drawn(top_k=4) == pytest.approx(probabilities, abs=0.1)


def test_an_answer_ends_at_the_end_of_turn_and_says_whether_it_did(loaded: LoadedModel) -> None:
    free = answer_prompts(loaded, PROMPTS, settings(), "").answers
    assert all(answer.tokens == 24 and not answer.finished for answer in free)
    prompt, ids = next((p, a.ids) for p, a in zip(PROMPTS, free, strict=True) if len(set(a.ids)) > 2)
    end = next(token for token in ids[1:] if token != ids[0])
    ending = LoadedModel(loaded.model, ending_at(loaded, end), {})
    [answer] = answer_prompts(ending, [prompt], settings(), "").answers
    assert answer.finished
    assert answer.ids == ids[: ids.index(end)]
    assert answer.seconds > 0


def test_figures_of_time_and_length_are_of_all_answers(loaded: LoadedModel) -> None:
    made = answer_prompts(loaded, PROMPTS, settings(max_tokens=5), "")
    assert made.tokens_per_second == pytest.approx(5 * len(PROMPTS) / made.seconds)
    assert all(0 < answer.seconds <= made.seconds for answer in made.answers)


def test_the_token_that_the_template_ends_turns_with_ends_answers(tiny_model: ModelFolder) -> None:
    tokenizer = load_model(tiny_model.path).tokenizer
    tokenizer.eos_token_ids = {0}
    end_turn_at(tokenizer, None)
    assert tokenizer.eos_token_ids == {0, 2}, "<|im_end|>, after which training supervises nothing"


def ending_at(loaded: LoadedModel, token: int) -> TokenizerWrapper:
    tokenizer = copy(loaded.tokenizer)
    tokenizer.eos_token_ids = {token}
    return tokenizer
