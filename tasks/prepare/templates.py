"""Chat templates taken apart: which text of a rendered chat is the template's, which a person's.

A chat is rendered twice: once with a placeholder for each turn's text, which shows what the template
itself writes and where an answer begins and ends, and once as it is, which has to be the same with the
texts in place. So a control token is one only where the template writes it, and no text can forge it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError
from tasks.prepare.rows import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tools = list[dict[str, Any]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + TURN_END + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + TURN_END + '\\n\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ raise_exception('the Alpaca form has no ' + message['role'] + ' turns') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")  # of the private use area: no template writes it
SKELETONS_KEPT = 4096  # chats with tools have one each


class TemplateError(ValueError):
    """The template refuses a chat, or makes of it what cannot be told apart."""


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat: a control token, a text of the template, or the text of a turn.

    Attributes:
        text: as rendered; for a turn, its placeholder.
        control: the token's id, or None.
        turn: the turn's index, or None.
        answer: the index of the assistant turn whose answer, or the token that ends it, this belongs
            to, or None.
    """

    text: str
    control: int | None
    turn: int | None
    answer: int | None


@dataclass(frozen=True, eq=False)
class Skeleton:
    """What a template writes around the turns of a chat with given roles, tools and tool calls.

    Attributes:
        pieces: in order; put together they are the rendered chat.
        literals: what stands before, between and after the turns.
        tail: an end-of-turn token the template leaves out after the last answer, else empty.
        writes_tools: False when the chat has tools and the template leaves them out.
    """

    pieces: tuple[Piece, ...]
    literals: tuple[str, ...]
    tail: str
    writes_tools: bool


def template_source(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str | None]:
    """A template's name for reports, and its Jinja source; None for the tokenizer's own.

    Args:
        name: "model" for the tokenizer's own, or ChatML where it has none; "chatml"; "alpaca".

    Raises:
        InputError: the tokenizer knows no token that could end a turn.
    """
    if name == "model" and tokenizer.chat_template:
        return "the model's own", None
    if name == "alpaca":
        return "Alpaca", _with_ends(ALPACA, tokenizer, tokenizer.eos_token)
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    end = "<|im_end|>" if "<|im_end|>" in known else tokenizer.eos_token
    return "ChatML", _with_ends(CHATML, tokenizer, end)


class ChatTemplate:
    """A chat template of a tokenizer.

    Args:
        source: Jinja; None for the tokenizer's own, or ChatML where it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._source = source or template_source("model", tokenizer)[1]
        self._controls = _Controls(tokenizer)
        self._skeletons: dict[Any, Skeleton] = {}

    def render(self, messages: Messages, tools: Tools | None = None, prompt: bool = False) -> str:
        """The chat as text, with `prompt` up to where the next answer begins.

        Raises:
            TemplateError: the template refuses these turns.
        """
        return str(self._apply(messages, tools, prompt))

    def render_all(self, chats: Sequence[Messages]) -> list[str]:
        """Several chats without tools, at once.

        Raises:
            TemplateError: the template refuses one of them.
        """
        return list(self._apply(chats, None, prompt=False)) if chats else []

    def skeleton(self, messages: Messages, tools: Tools | None = None) -> Skeleton:
        """What the template writes around these turns; kept for the next row alike.

        Raises:
            TemplateError: the template refuses the turns, or drops or repeats one.
        """
        key: Any = tuple(turn["role"] for turn in messages)
        if tools or any(len(turn) > 2 for turn in messages):
            bare = [{**turn, "content": bool(turn["content"])} for turn in messages]
            key = json.dumps([bare, tools])
        if key not in self._skeletons:
            if len(self._skeletons) >= SKELETONS_KEPT:
                self._skeletons.clear()
            self._skeletons[key] = self._take_apart(messages, tools)
        return self._skeletons[key]

    def fill(self, rendered: str, skeleton: Skeleton, messages: Messages) -> list[str]:
        """The text of each turn as the template writes it, in the template's order.

        Raises:
            TemplateError: the template changes a text by more than the white space around it, so that
                what it wrote cannot be told from what the person wrote.
        """
        turns = [piece.turn for piece in skeleton.pieces if piece.turn is not None]
        first, *others = skeleton.literals
        rendered += skeleton.tail
        texts = []
        place = len(first)
        fits = rendered.startswith(first)
        for turn, literal in zip(turns, others, strict=True):
            text = messages[turn]["content"]
            if not rendered.startswith(text + literal, place):
                text = text.strip()
                fits = fits and rendered.startswith(text + literal, place)
            place += len(text) + len(literal)
            texts.append(text)
        if not fits or place != len(rendered):
            raise TemplateError(CHANGED)
        return texts

    def pieces(self, messages: Messages, tools: Tools | None = None) -> Iterator[Piece]:
        """The pieces of a rendered chat, the text of each turn as the template writes it.

        Raises:
            TemplateError: as `skeleton` and `fill`.
        """
        skeleton = self.skeleton(messages, tools)
        texts = iter(self.fill(self.render(messages, tools), skeleton, messages))
        for piece in skeleton.pieces:
            if piece.turn is None:
                yield piece
            else:
                yield Piece(next(texts), None, piece.turn, piece.answer)

    def holds_control(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._controls.spelt_in(text)

    def _apply(self, messages: Any, tools: Tools | None, prompt: bool) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]  # it takes JSON schemas
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self._source,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateError(f"the chat template refuses it: {error}") from None

    def _take_apart(self, messages: Messages, tools: Tools | None) -> Skeleton:
        self._check_tools(messages, tools)
        shown = [place for place, turn in enumerate(messages) if turn["content"] or "tool_calls" not in turn]
        chat = [
            {**turn, "content": f"\ue000{place}\ue001" if place in shown else ""}
            for place, turn in enumerate(messages)
        ]
        rendered = self.render(chat, tools)
        found = {int(match[1]): match.span() for match in PLACEHOLDER.finditer(rendered)}
        if sorted(map(int, PLACEHOLDER.findall(rendered))) != shown:
            roles = ", ".join(turn["role"] for turn in messages)
            raise TemplateError(f"the chat template drops or repeats a turn of {roles}")
        tail = self._missing_end(chat, rendered, found)
        rendered += tail
        answers = {
            place: self._answer(chat, tools, rendered, found, place)
            for place, turn in enumerate(messages)
            if turn["role"] == "assistant"
        }
        literals = PLACEHOLDER.split(rendered)[::2]
        writes_tools = not tools or self.render(chat) + tail != rendered
        return Skeleton(tuple(self._cut(rendered, answers)), tuple(literals), tail, writes_tools)

    def _check_tools(self, messages: Messages, tools: Tools | None) -> None:
        """Tools and calls are written into the template's own text: none may forge a control token."""
        more = [{**turn, "content": ""} for turn in messages if len(turn) > 2]
        if (tools or more) and self._controls.spelt_in(json.dumps([tools, more], ensure_ascii=False)):
            raise TemplateError("a tool or tool call spells a control token; take it out")
        if any("tool_calls" in turn for turn in messages):
            chat = [{**turn, "content": turn["content"] or "?"} for turn in messages]
            without = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in chat]
            if self.render(chat, tools) == self.render(without, tools):
                raise TemplateError("the chat template does not write tool calls; use another data.template")

    def _missing_end(self, chat: Messages, rendered: str, found: dict[int, tuple[int, int]]) -> str:
        """The end-of-sequence token where the template puts no control token after the last answer."""
        last = max(found, key=lambda turn: found[turn], default=0)
        after = rendered[found[last][1] :] if found else rendered
        if chat[-1]["role"] != "assistant" or last != len(chat) - 1 or self._controls.find(after):
            return ""
        if not self._tokenizer.eos_token:
            raise InputError("neither chat template nor tokenizer knows a token that ends an answer")
        return str(self._tokenizer.eos_token)

    def _answer(
        self,
        chat: Messages,
        tools: Tools | None,
        rendered: str,
        found: dict[int, tuple[int, int]],
        turn: int,
    ) -> tuple[int, int]:
        """Where an answer begins and, with the token that ends it, ends.

        It begins where the generation prompt ends, if the chat goes on from one, else with its text.
        The difference is what the model itself has to write first, as an empty `<think>` block. A
        special token in it is the turn's heading, left out by a template that knows no generation prompt.
        """
        text = found.get(turn)
        start = text[0] if text else -1
        try:
            prompt = self.render(chat[:turn], tools, prompt=True)
        except TemplateError:
            prompt = ""
        if prompt and rendered.startswith(prompt) and (text is None or len(prompt) <= start):
            gap = rendered[len(prompt) : start] if text else ""
            if not PLACEHOLDER.search(gap) and not self._controls.find(gap, special=True):
                start = len(prompt)
        if start < 0:
            raise TemplateError(
                f"the chat template does not tell where the tool call of turn {turn + 1} begins"
            )
        end = text[1] if text else start
        stop = min((other for other, _ in found.values() if other >= end), default=len(rendered))
        controls = self._controls.find(rendered[end:stop])
        if "tool_calls" in chat[turn]:
            # A call may hold control tokens of its own: it ends where a plain answer would.
            controls = [one for one in controls if one[2] in self._ends()]
            if not controls:
                raise TemplateError(f"the chat template does not end the tool call of turn {turn + 1}")
        # Without a control token before the next turn, after the text.
        return start, end + controls[0][1] if controls else end

    def _ends(self) -> set[int]:
        """The tokens that end an answer: the one after a plain answer, and the end of sequence."""
        plain = self.skeleton([{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}])
        ends = {piece.control for piece in plain.pieces if piece.answer is not None}
        return {end for end in (*ends, self._tokenizer.eos_token_id) if isinstance(end, int)}

    def _cut(self, rendered: str, answers: dict[int, tuple[int, int]]) -> Iterator[Piece]:
        controls = {(start, stop): token for start, stop, token in self._controls.find(rendered)}
        turns = {match.span(): int(match[1]) for match in PLACEHOLDER.finditer(rendered)}
        spans = (*controls, *turns, *answers.values())
        marks = {0, len(rendered), *(mark for span in spans for mark in span)}
        marks -= {mark for mark in marks for start, stop in controls if start < mark < stop}
        for span in itertools.pairwise(sorted(marks)):
            inside = (turn for turn, (start, stop) in answers.items() if start <= span[0] and span[1] <= stop)
            yield Piece(rendered[slice(*span)], controls.get(span), turns.get(span), next(inside, None))


class _Controls:
    """Finds a tokenizer's added tokens in a text as the tokenizer itself does."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        ids = {token.content: token_id for token_id, token in added.items()}
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._beginnings = {token.content[:2] for token in added.values()}
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

    def spelt_in(self, text: str) -> bool:
        """Whether there is any; quick where there is none."""
        begins = any(two in text for two in self._beginnings)
        return begins and self._pattern.search(text) is not None


CHANGED = (
    "the chat template rewrites the text of a turn, so what is to be learnt cannot be told exactly; "
    "remove markup such as <think> from the row"
)


def _with_ends(source: str, tokenizer: Any, end: str | None) -> str:
    """The template with the token that ends a turn, and the one the tokenizer begins every text with."""
    if not end:
        raise InputError("neither chat template nor tokenizer knows a token that ends an answer")
    first = tokenizer.bos_token if tokenizer.encode("x")[:1] == [tokenizer.bos_token_id] else ""
    return (f"{{{{ {_quoted(first)} }}}}" if first else "") + source.replace("TURN_END", _quoted(end))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
