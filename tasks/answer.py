"""A model that answers: one chat at a time, as text arrives. What chat, generate and a served model share.

The prompt is exactly what stood before an answer in training: the chat template, the system prompt and a
soft prompt of that training, control tokens only where the template writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from tasks.prepare.rows import Messages


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: of an answer, at most.
        temperature: 0 takes the likeliest token always.
        top_p: share of probability that is drawn from, the likeliest tokens first.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens = {self.max_tokens}; give a number of tokens from 1 up")
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature = {self.temperature}; give 0 (the likeliest token) up to 100")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}; give a share over 0 up to 1")


@dataclass(frozen=True)
class Piece:
    """Some text of an answer as it arrives.

    Attributes:
        text: what is new.
        tokens: generated so far.
        tokens_per_second: of generation so far, the prompt left out.
        ended_by: "stop" by the model, "length" by a limit; None while it goes on.
    """

    text: str
    tokens: int
    tokens_per_second: float
    ended_by: str | None


class Answering:
    """A base model with an adapter, loaded, and what it remembers of the chat so far.

    Args:
        model: the base model's folder.
        adapter: a folder that belongs to it, or None.
        template: a chat template in Jinja, where it is not the model's own.
        system_prompt: put before chats that have none of their own.

    Raises:
        InputError: model and adapter do not belong together.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        from tasks.models.load import load_model
        from tasks.prepare.tokenise import chat_encoder
        from tasks.train.adapters import load_adapter
        from tasks.train.soft_prompt import prefix_ids

        loaded = load_model(model)
        if adapter is not None:
            load_adapter(loaded.model, adapter)
        self._network, self._tokenizer = loaded.model, loaded.tokenizer
        self._context_tokens: int | None = loaded.config.get("max_position_embeddings")
        self._encoder = chat_encoder(loaded.tokenizer, template)
        self._tokenizer.eos_token_ids = {*self._tokenizer.eos_token_ids, self._end_of_answer()}
        self._soft_prompt = prefix_ids(loaded.model)
        self._system_prompt = system_prompt
        self._cache: list[Any] = []
        self._cached: list[int] = []

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[Piece]:
        """The answer to a chat, piece by piece; the last piece says how it ended.

        A chat that goes on from the one before is read only where it is new. Sampling draws from MLX's
        global random state, as mlx_lm's samplers do.

        Raises:
            InputError: the chat is longer than the model reads, or its template refuses it.
        """
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        ids = self.prompt_ids(messages)
        most = self._room(ids, sampling.max_tokens)
        known = self._known(ids)
        # What is cut short, by Ctrl-C too, leaves no cache: it may hold a token more than was seen.
        cache, self._cache, self._cached = self._cache, [], []
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
        answers: Iterator[GenerationResponse] = stream_generate(
            self._network, self._tokenizer, ids[known:], most, sampler=sampler, prompt_cache=cache
        )
        written = []
        for answer in answers:
            written.append(int(answer.token))
            tokens = answer.generation_tokens - (answer.finish_reason == "stop")
            yield Piece(answer.text, tokens, answer.generation_tps, answer.finish_reason)
        self._cache = cache
        self._cached = (ids + written)[: getattr(cache[0], "offset", 0)]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids of a chat up to where the answer begins, with the system prompt and the soft prompt.

        Raises:
            InputError: the chat is empty, ends in an answer, or the template refuses it.
        """
        from tasks.prepare.templates import TemplateError

        if not messages or messages[-1]["role"] == "assistant":
            raise InputError("there is nothing to answer: a chat has to end in a turn of the user")
        if self._system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        asked: Messages = [*messages, {"role": "assistant", "content": "?"}]
        try:
            return [*self._soft_prompt, *self._encoder.prompt(asked)]
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in messages)
            raise InputError(f"a chat of {roles}: {error}") from None

    def _end_of_answer(self) -> int:
        """The token that the template ends an answer with; it need not be the tokenizer's end of text."""
        chat: Messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        [(ids, supervised)] = self._encoder.rows([chat])
        last = max(place for place, learnt in enumerate(supervised) if learnt)
        return ids[last]

    def _room(self, ids: Sequence[int], max_tokens: int) -> int:
        if self._context_tokens is None:
            return max_tokens
        if len(ids) >= self._context_tokens:
            raise InputError(
                f"the chat is {len(ids):,} tokens long, the model reads {self._context_tokens:,}; begin anew"
            )
        return min(max_tokens, self._context_tokens - len(ids))

    def _known(self, ids: Sequence[int]) -> int:
        """How many of the ids the cache holds, cut back to them; one at least has to be read anew."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        pairs = zip(self._cached, ids[:-1], strict=False)
        common = next((place for place, (old, new) in enumerate(pairs) if old != new), None)
        common = min(len(self._cached), len(ids) - 1) if common is None else common
        extra = len(self._cached) - common
        if common and (not extra or can_trim_prompt_cache(self._cache)):
            trim_prompt_cache(self._cache, extra)
            return common
        self._cache = make_prompt_cache(self._network)
        return 0
