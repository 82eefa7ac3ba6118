"""Chat templates taken apart: which text of a rendered chat is the template's, which a person's.

A chat is rendered twice: once with a placeholder for each turn's text, which shows what the template
itself writes and where an answer begins and ends, and once as it is, which has to be the same with the
texts in place. So a control token is one only where the template writes it, and no text can forge it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError
from tasks.prepare.rows import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + 'TURN_END' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")  # of the private use area: no template writes it


class TemplateError(ValueError):
    """The template refuses a chat, or makes of it what cannot be told apart."""


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat: a control token, a text of the template, or the text of a turn.

    Attributes:
        text: as rendered; for a turn, its placeholder.
        control: the token's id, or None.
        turn: the turn's index, or None.
        supervised: whether it belongs to an answer or is the token that ends it.
    """

    text: str
    control: int | None
    turn: int | None
    supervised: bool


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the turns of a chat with given roles.

    Attributes:
        pieces: in order; put together they are the rendered chat.
        literals: what stands before, between and after the turns.
        tail: an end-of-turn token the template leaves out after the last answer, else empty.
    """

    pieces: tuple[Piece, ...]
    literals: tuple[str, ...]
    tail: str


class ChatTemplate:
    """A tokenizer's chat template, or ChatML for a tokenizer without one.

    Attributes:
        name: "the model's own" or "ChatML", for reports.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._own = bool(tokenizer.chat_template)
        self.name = "the model's own" if self._own else "ChatML"
        self._source = None if self._own else _chatml(tokenizer)
        self._controls = _Controls(tokenizer)
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The chat as text.

        Raises:
            TemplateError: the template refuses these turns.
        """
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._source,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateError(f"the chat template refuses it: {error}") from None
        return str(text)

    def skeleton(self, roles: Sequence[str]) -> Skeleton:
        """What the template writes around turns of these roles; kept for the next row alike.

        Raises:
            TemplateError: the template refuses the roles, or drops or repeats a turn.
        """
        key = tuple(roles)
        if key not in self._skeletons:
            self._skeletons[key] = self._take_apart(key)
        return self._skeletons[key]

    def pieces(self, messages: Messages) -> Iterator[Piece]:
        """The pieces of a rendered chat, the text of each turn as the template writes it.

        Raises:
            TemplateError: the template changes a text by more than the white space around it, so that
                what it wrote cannot be told from what the person wrote.
        """
        skeleton = self.skeleton([turn["role"] for turn in messages])
        rendered = self.render(messages) + skeleton.tail
        texts = _fill(rendered, skeleton, messages)
        for piece in skeleton.pieces:
            if piece.turn is None:
                yield piece
            else:
                yield Piece(next(texts), None, piece.turn, piece.supervised)

    def _take_apart(self, roles: tuple[str, ...]) -> Skeleton:
        chat = [{"role": role, "content": f"\ue000{turn}\ue001"} for turn, role in enumerate(roles)]
        rendered = self.render(chat)
        found = {int(match[1]): match.span() for match in PLACEHOLDER.finditer(rendered)}
        if sorted(map(int, PLACEHOLDER.findall(rendered))) != list(range(len(roles))):
            raise TemplateError(f"the chat template drops or repeats a turn of {', '.join(roles)}")
        tail = self._missing_end(roles, rendered, found)
        rendered += tail
        answers = [
            (self._answer_start(chat[:turn], rendered, found[turn]), self._answer_end(rendered, found, turn))
            for turn, role in enumerate(roles)
            if role == "assistant"
        ]
        literals = PLACEHOLDER.split(rendered)[::2]
        return Skeleton(tuple(self._cut(rendered, answers)), tuple(literals), tail)

    def _missing_end(self, roles: tuple[str, ...], rendered: str, found: dict[int, tuple[int, int]]) -> str:
        """The end-of-sequence token where the template puts no control token after the last answer."""
        last = max(found, key=lambda turn: found[turn])
        if roles[last] != "assistant" or self._controls.find(rendered[found[last][1] :]):
            return ""
        if not self._tokenizer.eos_token:
            raise InputError("neither chat template nor tokenizer knows a token that ends an answer")
        return str(self._tokenizer.eos_token)

    def _answer_start(self, before: Messages, rendered: str, text: tuple[int, int]) -> int:
        """Where the generation prompt ends, if the chat goes on from one; else where the text begins.

        The difference is what the model itself has to write first, as an empty `<think>` block. A special
        token in it is the turn's heading, left out by a template that knows no generation prompt.
        """
        try:
            prompt = self.render(before, add_generation_prompt=True)
        except TemplateError:
            return text[0]
        gap = rendered[len(prompt) : text[0]]
        goes_on = rendered.startswith(prompt) and len(prompt) <= text[0] and not PLACEHOLDER.search(gap)
        return len(prompt) if goes_on and not self._controls.find(gap, special=True) else text[0]

    def _answer_end(self, rendered: str, found: dict[int, tuple[int, int]], turn: int) -> int:
        """After the first control token behind the text; after the text where the next turn is nearer."""
        start = found[turn][1]
        following = [other for other, _ in found.values() if other >= start]
        stop = min(following, default=len(rendered))
        controls = self._controls.find(rendered[start:stop])
        return start + controls[0][1] if controls else start

    def _cut(self, rendered: str, answers: list[tuple[int, int]]) -> Iterator[Piece]:
        controls = {(start, stop): token for start, stop, token in self._controls.find(rendered)}
        turns = {match.span(): int(match[1]) for match in PLACEHOLDER.finditer(rendered)}
        marks = {0, len(rendered), *(mark for span in (*controls, *turns, *answers) for mark in span)}
        marks -= {mark for mark in marks for start, stop in controls if start < mark < stop}
        edges = sorted(marks)
        for span in itertools.pairwise(edges):
            supervised = any(start <= span[0] and span[1] <= stop for start, stop in answers)
            yield Piece(rendered[slice(*span)], controls.get(span), turns.get(span), supervised)


class _Controls:
    """Finds a tokenizer's added tokens in a template's text as the tokenizer itself does."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        ids = {token.content: token_id for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        longest_first = sorted(added.values(), key=lambda token: -len(token.content))
        alternatives = [
            (r"\s*" if token.lstrip else "")
            + f"(?P<_{ids[token.content]}>{re.escape(token.content)})"
            + (r"\s*" if token.rstrip else "")
            for token in longest_first
        ]
        self._pattern = re.compile("|".join(alternatives) or r"(?!)")

    def find(self, text: str, special: bool = False) -> list[tuple[int, int, int]]:
        """(start, stop, token id) of each control token, in order; only `special` ones if so asked."""
        found = [
            (match.start(), match.end(), int(str(match.lastgroup)[1:]))
            for match in self._pattern.finditer(text)
        ]
        return [one for one in found if one[2] in self._special or not special]


def _fill(rendered: str, skeleton: Skeleton, messages: Messages) -> Iterator[str]:
    """The text of each turn as rendered, in the template's order: as given, or without outer blanks."""
    turns = [piece.turn for piece in skeleton.pieces if piece.turn is not None]
    first, *others = skeleton.literals
    place = len(first)
    if not rendered.startswith(first):
        raise TemplateError(CHANGED)
    for turn, literal in zip(turns, others, strict=True):
        text = messages[turn]["content"]
        for candidate in (text, text.strip()):
            if rendered.startswith(candidate + literal, place):
                place += len(candidate) + len(literal)
                yield candidate
                break
        else:
            raise TemplateError(CHANGED)
    if place != len(rendered):
        raise TemplateError(CHANGED)


CHANGED = (
    "the chat template rewrites the text of a turn, so what is to be learnt cannot be told exactly; "
    "remove markup such as <think> from the row"
)


def _chatml(tokenizer: PreTrainedTokenizerFast) -> str:
    """ChatML, its turns ended by the tokenizer's end of sequence where `<|im_end|>` is no token."""
    ids = {token.content for token in tokenizer.added_tokens_decoder.values()}
    end = "<|im_end|>" if "<|im_end|>" in ids else tokenizer.eos_token
    if not end:
        raise InputError("neither chat template nor tokenizer knows a token that ends an answer")
    return CHATML.replace("TURN_END", str(end).replace("\\", "\\\\").replace("'", "\\'"))
