"""Answers by batched decoding: mlx-lm's continuous batching, where a finished answer makes room for the next.

With temperature 0 the text of an answer is that of `mlx_lm.generate` with the prompt alone, but for float
rounding: mlx-lm's batch caches mask their padding and count positions row by row, so no row sees another;
only the sums of a matrix product may run in another order. Not every architecture keeps to that (mlx-lm
0.32.2: gemma2 lays the masks of a batch's rows over its heads, Mamba's state runs through the padding), so
two short prompts are first answered both ways. Sampled answers do not depend on the batch either: each
draws from keys of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from tasks.config import EvaluateSettings
from tasks.progress import progress

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from tasks.models.load import LoadedModel

log = logging.getLogger(__name__)

PROBE_LENGTHS = (2, 12)
"""Prompts (tokens) on which batching is held to the plain way: the shorter one is padded."""

PROBE_STEPS, PROBE_TOKEN = 2, 5

TOLERANCES = {mx.float32: 1e-2, mx.float16: 2e-2, mx.bfloat16: 0.15}
"""Largest difference of log-probabilities: the same sums in another order, 1.2e-3 seen in float32."""

Sampler = Callable[[mx.array], mx.array]
"""From log-probabilities (1, vocabulary) to a token (1,)."""

Processor = Callable[[Any, mx.array], mx.array]
"""From the tokens so far and logits (1, vocabulary) to logits."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without the end of turn, white space around it removed.
        ids: of the tokens written, without the end of turn.
        seconds: from the start of the batch step that took up its prompt to its last token.
        finished: False where `max_tokens` cut it off.
    """

    text: str
    ids: list[int]
    seconds: float
    finished: bool

    @property
    def tokens(self) -> int:
        """How many were written."""
        return len(self.ids)


@dataclass(frozen=True)
class Answers:
    """All answers, in the order of the prompts, and how long they took together."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens written by the second, with the reading of the prompts."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


@dataclass
class _Draft:
    ids: list[int] = field(default_factory=list)
    started_s: float = 0.0
    seconds: float = 0.0
    finished: bool = False


def answer_prompts(
    loaded: LoadedModel, prompts: Sequence[list[int]], settings: EvaluateSettings, title: str
) -> Answers:
    """Answer every prompt, `settings.batch_size` at once.

    An answer ends at any token that ends a turn: the tokenizer's, the model's, or the template's.

    Args:
        prompts: token ids each, of `tasks.prepare.tokenise.encode_prompt`; a soft prompt is put in front.
    """
    from tasks.train.evaluating import evaluating
    from tasks.train.soft_prompt import prefix_ids

    model, tokenizer = loaded.model, loaded.tokenizer
    in_front = prefix_ids(model)
    asked = [in_front + prompt for prompt in prompts]
    drafts = [_Draft() for _ in asked]
    with evaluating(model), progress(title, total=len(asked)) as bar:
        fault = batching_fault(model, in_front)
        if fault:
            log.warning("answers are written one by one, which is slower: %s", fault)
        write = _written_alone if fault else _written_together
        started = time.perf_counter()
        for row in write(model, tokenizer, asked, settings, drafts):
            drafts[row].seconds = time.perf_counter() - drafts[row].started_s
            bar.advance(1)
        seconds = time.perf_counter() - started
    return Answers([_answer(draft, tokenizer) for draft in drafts], seconds)


def end_turn_at(tokenizer: TokenizerWrapper, template: str | None) -> None:
    """Let answers end where the chat template ends them, too: the token that training taught to be last."""
    from tasks.prepare.tokenise import PROBE, chat_encoder

    [(ids, supervised)] = chat_encoder(tokenizer, template).rows([PROBE], "last-answer")
    last = max(place for place, learnt in enumerate(supervised) if learnt)
    tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, ids[last]}


def batching_fault(model: Any, in_front: Sequence[int] = ()) -> str:
    """Why this model's answers in a batch would not be those alone; empty when they are the same.

    Args:
        in_front: of every prompt, as a soft prompt is.
    """
    prompts = [[*in_front, *range(3, 3 + length)] for length in PROBE_LENGTHS]
    alone = [_first_steps(model, prompt) for prompt in prompts]
    try:
        together = _first_steps_together(model, prompts)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        return str(error)
    difference = max(
        float(mx.abs(left - right).max())
        for ours, theirs in zip(together, alone, strict=True)
        for left, right in zip(ours, theirs, strict=True)
    )
    tolerance = TOLERANCES.get(alone[0][0].dtype, max(TOLERANCES.values()))
    return "" if difference <= tolerance else f"log-probabilities differ by {difference:.2g}"


def _first_steps(model: Any, prompt: list[int]) -> list[mx.array]:
    """Log-probabilities (vocabulary,) of the first tokens of an answer, which are always the same."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=PROBE_STEPS, sampler=_always)
    return [log_probabilities for _, log_probabilities in steps]


def _first_steps_together(model: Any, prompts: list[list[int]]) -> list[list[mx.array]]:
    """As `_first_steps`, of several prompts in a batch."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, sampler=_always, prefill_batch_size=len(prompts))
    try:
        steps: dict[int, list[mx.array]] = {
            uid: [] for uid in generator.insert(prompts, [PROBE_STEPS] * len(prompts))
        }
        while any(len(found) < PROBE_STEPS for found in steps.values()):
            for step in generator.next()[1]:
                steps[step.uid].append(step.logprobs)
    finally:
        generator.close()
    return list(steps.values())


def _always(log_probabilities: mx.array) -> mx.array:
    return mx.full(log_probabilities.shape[:1], PROBE_TOKEN, mx.uint32)


def _answer(draft: _Draft, tokenizer: TokenizerWrapper) -> Answer:
    text = tokenizer.decode(draft.ids)
    return Answer(text.strip(), draft.ids, draft.seconds, draft.finished)


def _written_together(
    model: Any,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    settings: EvaluateSettings,
    drafts: Sequence[_Draft],
) -> Iterator[int]:
    """Fill in the drafts; yields the row of each answer that is done."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=settings.batch_size,
        prefill_batch_size=settings.batch_size,
    )
    # Longest first: prompts taken up together are padded least, and memory peaks at the start.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    uids = generator.insert(
        [prompts[row] for row in order],
        [settings.max_tokens] * len(order),
        samplers=[sampler(settings, row) for row in order],
        logits_processors=[processors(settings) for _ in order],
    )
    rows = dict(zip(uids, order, strict=True))
    try:
        left = len(order)
        while left:
            now = time.perf_counter()
            reading, writing = generator.next()
            for step in reading:
                draft = drafts[rows[step.uid]]
                draft.started_s = draft.started_s or now
            for step in writing:
                row = rows[step.uid]
                if step.finish_reason != "stop":
                    drafts[row].ids.append(step.token)
                if step.finish_reason:
                    drafts[row].finished = step.finish_reason == "stop"
                    left -= 1
                    yield row
    finally:
        generator.close()


def _written_alone(
    model: Any,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    settings: EvaluateSettings,
    drafts: Sequence[_Draft],
) -> Iterator[int]:
    """As `_written_together`, one prompt after the other."""
    from mlx_lm.generate import generate_step

    for row, prompt in enumerate(prompts):
        draft = drafts[row]
        draft.started_s = time.perf_counter()
        steps = generate_step(
            mx.array(prompt),
            model,
            max_tokens=settings.max_tokens,
            sampler=sampler(settings, row),
            logits_processors=processors(settings),
        )
        for token, _ in steps:
            if token in tokenizer.eos_token_ids:
                draft.finished = True
                break
            draft.ids.append(int(token))
        yield row


def sampler(settings: EvaluateSettings, row: int) -> Sampler:
    """How the tokens of an answer are chosen; what is drawn depends on (seed, row, place), not on a batch."""
    from mlx_lm.sample_utils import apply_top_k, apply_top_p, greedy_sampler

    if settings.temperature == 0:
        return greedy_sampler
    place = 0

    def draw(log_probabilities: mx.array) -> mx.array:
        nonlocal place
        likely = log_probabilities
        if settings.top_p < 1:
            likely = apply_top_p(likely, settings.top_p)
        if settings.top_k is not None and settings.top_k < likely.shape[-1]:
            likely = apply_top_k(likely, settings.top_k)
        key = np.random.SeedSequence([settings.seed, row, place]).generate_state(1, np.uint64)[0]
        place += 1
        return mx.random.categorical(likely / settings.temperature, key=mx.random.key(int(key)))

    return draw


def processors(settings: EvaluateSettings) -> list[Processor]:
    """What is done to logits before a token is chosen."""
    from mlx_lm.sample_utils import make_logits_processors

    if settings.repetition_penalty == 1:
        return []
    made: list[Processor] = make_logits_processors(repetition_penalty=settings.repetition_penalty)
    return made
