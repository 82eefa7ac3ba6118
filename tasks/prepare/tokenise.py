"""Chats to token ids with an exact supervision mask.

A rendered chat is cut where the template writes a control token and where an answer begins; the
stretches between are encoded as plain text, so a row that spells `<|im_end|>` stays text, and no token
spans a question and its answer: training sees what generation will see. Without the cuts at answers
the ids are those of the whole text; a probe holds every tokenizer to that when it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tasks.errors import InputError
from tasks.prepare.rows import Messages, Row
from tasks.prepare.templates import ChatTemplate, Piece, Skeleton, TemplateError, Tools

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TokenRow = tuple[list[int], list[bool]]

PROBE: Messages = [
    {"role": "user", "content": "Where is the harbour?"},
    {"role": "assistant", "content": "Beyond the hill."},
    {"role": "user", "content": "Thank you, 12 times."},
    {"role": "assistant", "content": "Good bye."},
]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder; nothing is fetched and no code of the folder is run.

    Raises:
        InputError: the folder has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be read: {error}") from None
    return cast("PreTrainedTokenizerFast", tokenizer)


def encode_prompt(
    tokenizer: Any, messages: Messages, tools: Tools | None = None, template: str | None = None
) -> list[int]:
    """Token ids up to where the last answer begins: what the model is given to write that answer.

    They are exactly the ids that stand before it in training. Turns from the last answer on are not
    used; without an answer, the whole chat is the prompt.

    Args:
        tokenizer: of transformers, or mlx-lm's wrapper around one.
        messages: the turns of a row.
        tools: that the row may call.
        template: the chat template in Jinja, where it is not the tokenizer's own.

    Raises:
        TemplateError: the template refuses the turns.
    """
    return chat_encoder(tokenizer, template).prompt(messages, tools)


@lru_cache(maxsize=4)
def chat_encoder(tokenizer: Any, template: str | None = None) -> ChatEncoder:
    """The encoder of a tokenizer, made once."""
    return ChatEncoder(tokenizer, template)


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, laid end to end.

    Attributes:
        tokens: (total,) int32.
        supervised: (total,) bool; never a row's first token, which nothing precedes.
        lengths: (rows,) int64.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    def only(self, keep: NDArray[np.bool_]) -> Encoded:
        """The rows where `keep`, (rows,), is true."""
        tokens = np.repeat(keep, self.lengths)
        return Encoded(self.tokens[tokens], self.supervised[tokens], self.lengths[keep])

    @property
    def supervised_counts(self) -> NDArray[np.int64]:
        """(rows,) supervised tokens in each row, none of which is empty."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.add.reduceat(self.supervised, starts, dtype=np.int64)

    def rows(self) -> Iterator[TokenRow]:
        """Token ids and supervision of each row."""
        ends = np.cumsum(self.lengths).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield self.tokens[start:end].tolist(), self.supervised[start:end].tolist()


@dataclass(frozen=True)
class Layout:
    """Rows cut into stretches: some encoded already, the others waiting by what they come after.

    Attributes:
        stretches: token ids of each stretch, rows end to end; empty where they are not known yet.
        supervised: of each stretch.
        counts: stretches of each row, one at least.
        waiting: places in `stretches` and their texts, by a key of `ChatEncoder`'s backends.
    """

    stretches: list[Sequence[int]] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    waiting: dict[str, tuple[list[int], list[str]]] = field(
        default_factory=lambda: {after: ([], []) for after in ("start", "control", "cut")}
    )


@dataclass(frozen=True)
class _Stretch:
    """Text between two cuts, or a control token.

    Attributes:
        parts: texts of the template, and turns by index.
        fixed: the token ids where no turn is in it.
        answer: the assistant turn it belongs to, or None.
        after: "start" of the chat, a "control" token, or a "cut" at an answer's edge.
    """

    parts: tuple[str | int, ...]
    fixed: list[int] | None
    answer: int | None
    after: str


class ChatEncoder:
    """Encodes chats by one tokenizer and one chat template, and texts by the tokenizer.

    Args:
        tokenizer: of transformers, or mlx-lm's wrapper around one.
        template: in Jinja; None for the tokenizer's own, or ChatML where it has none.

    Raises:
        InputError: the tokenizer has no `tokenizer.json` form, or encodes text between control tokens
            in a way that cannot be had piece by piece.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        inner = getattr(tokenizer, "_tokenizer", None)
        if hasattr(inner, "apply_chat_template"):  # mlx-lm wraps the tokenizer of transformers
            tokenizer = inner
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InputError("the model has no fast tokenizer; convert it to one with a tokenizer.json")
        self.template = ChatTemplate(tokenizer, template)
        self._whole = tokenizer
        self._plans: dict[Skeleton, list[_Stretch]] = {}
        self._before_text, self._after_text = _around_texts(tokenizer)
        try:
            pieces = [*self.template.pieces(PROBE)]
        except TemplateError as error:
            raise InputError(f"no chat can be written for this model: {error}") from None
        controls = {piece.text.strip() for piece in pieces if piece.control is not None}
        self._plain = {after: _plain_backend(tokenizer, controls, after) for after in ("start", "cut")}
        self._plain["control"] = self._plain["start"]
        if not self._agrees_with_whole(pieces):
            self._plain["control"] = self._plain["cut"]
            if not self._agrees_with_whole(pieces):
                raise InputError("this tokenizer joins text across control tokens; use another base model")

    def lay_out(self, rows: Sequence[Row], supervise: str = "answers") -> Layout:
        """Render the rows and cut them into stretches.

        Args:
            supervise: "answers" and the tokens that end them, the "last-answer" only, or "everything";
                texts are learnt whole.

        Raises:
            TemplateError: the template refuses a chat.
        """
        layout = Layout()
        plain = [row.messages for row in rows if row.messages and not row.tools]
        rendered = iter(self.template.render_all(plain))
        for row in rows:
            before = len(layout.stretches)
            if row.messages:
                text = self.template.render(row.messages, row.tools) if row.tools else next(rendered)
                self._lay_out_chat(layout, row, text, supervise)
            else:
                self._lay_out_text(layout, row.text)
            layout.counts.append(len(layout.stretches) - before)
        return layout

    def encode(self, layout: Layout) -> Encoded:
        """The tokens of a layout. Most of the work is outside Python: a thread of its own is worth it."""
        stretches = layout.stretches
        for after, (places, texts) in layout.waiting.items():
            encodings = self._plain[after].encode_batch_fast(texts, add_special_tokens=False)
            for place, encoding in zip(places, encodings, strict=True):
                stretches[place] = encoding.ids
        lengths = np.fromiter(map(len, stretches), np.int64, len(stretches))
        tokens = np.fromiter(chain.from_iterable(stretches), np.int32, int(lengths.sum()))
        supervised = np.repeat(np.array(layout.supervised, np.bool_), lengths)
        starts = np.cumsum([0, *layout.counts])[:-1]
        of_rows = np.add.reduceat(lengths, starts) if layout.counts else np.zeros(0, np.int64)
        supervised[np.cumsum(of_rows) - of_rows] = False
        return Encoded(tokens, supervised, of_rows)

    def rows(self, chats: Sequence[Messages], supervise: str = "answers") -> list[TokenRow]:
        """Token ids and supervision of each chat, as `lay_out` and `encode` give them."""
        return [*self.encode(self.lay_out([Row(0, "messages", chat) for chat in chats], supervise)).rows()]

    def prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Token ids up to where the last answer begins; see `encode_prompt`."""
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        asked = messages[: answers[-1]] if answers else messages
        chat: Messages = [*asked, {"role": "assistant", "content": "?"}]
        layout = self.lay_out([Row(0, "messages", chat, tools=tools)], "last-answer")
        [(ids, supervised)] = self.encode(layout).rows()
        return ids[: supervised.index(True)]

    def shown(self, row: Row, supervise: str) -> list[tuple[str, bool]]:
        """A row as it is learnt: texts decoded from its tokens, and whether they are supervised."""
        [(ids, supervised)] = self.encode(self.lay_out([row], supervise)).rows()
        runs = groupby(zip(ids, supervised, strict=True), key=lambda pair: pair[1])
        return [(self.decode([token for token, _ in run]), learnt) for learnt, run in runs]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        return str(self._whole.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def shorten(self, text: str, by_tokens: int) -> str:
        """A text without its first `by_tokens` tokens; empty when it has no more."""
        offsets = self._plain["cut"].encode(text, add_special_tokens=False).offsets
        return text[offsets[by_tokens][0] :] if by_tokens < len(offsets) else ""

    def _lay_out_chat(self, layout: Layout, row: Row, rendered: str, supervise: str) -> None:
        skeleton = self.template.skeleton(row.messages, row.tools)
        turns = (piece.turn for piece in skeleton.pieces if piece.turn is not None)
        texts = dict(zip(turns, self.template.fill(rendered, skeleton, row.messages), strict=True))
        plan = self._plan(skeleton)
        last = max((one.answer for one in plan if one.answer is not None), default=None)
        for one in plan:
            if one.fixed is None:
                places, waiting = layout.waiting[one.after]
                places.append(len(layout.stretches))
                waiting.append("".join([texts[p] if isinstance(p, int) else p for p in one.parts]))
            layout.stretches.append(one.fixed or ())
            layout.supervised.append(
                supervise == "everything"
                or (one.answer is not None and (supervise == "answers" or one.answer == last))
            )

    def _lay_out_text(self, layout: Layout, text: str) -> None:
        places, waiting = layout.waiting["start"]
        places.append(len(layout.stretches) + 1)
        waiting.append(text)
        layout.stretches.extend([self._before_text, (), self._after_text])
        layout.supervised.extend([True, True, True])

    def _plan(self, skeleton: Skeleton) -> list[_Stretch]:
        if skeleton not in self._plans:
            if len(self._plans) >= 4096:
                self._plans.clear()
            self._plans[skeleton] = [*self._stretches(skeleton.pieces, cut=True)]
        return self._plans[skeleton]

    def _stretches(self, pieces: Sequence[Piece], cut: bool) -> Iterator[_Stretch]:
        """Join the pieces between control tokens, and with `cut` between the edges of answers."""
        parts: list[str | int] = []
        answer, after = None, "start"
        for piece in pieces:
            if parts and (piece.control is not None or (cut and piece.answer != answer)):
                yield self._stretch(parts, answer, after)
                parts, after = [], "cut"
            answer = piece.answer
            if piece.control is not None:
                yield _Stretch((), [piece.control], answer, "")
                after = "control"
            else:
                parts.append(piece.text if piece.turn is None else piece.turn)
        if parts:
            yield self._stretch(parts, answer, after)

    def _stretch(self, parts: list[str | int], answer: int | None, after: str) -> _Stretch:
        if any(isinstance(part, int) for part in parts):
            return _Stretch(tuple(parts), None, answer, after)
        text = "".join(map(str, parts))
        return _Stretch((), self._plain[after].encode(text, add_special_tokens=False).ids, answer, after)

    def _agrees_with_whole(self, pieces: Sequence[Piece]) -> bool:
        texts = [Piece(piece.text, piece.control, None, piece.answer) for piece in pieces]
        ids = [token for one in self._stretches(texts, cut=False) for token in one.fixed or ()]
        text = "".join(piece.text for piece in pieces)
        return ids == list(self._whole.encode(text, add_special_tokens=False))


def _around_texts(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and after it with the end of sequence, as mlx-lm adds it."""
    whole = list(tokenizer.encode("x"))
    plain = list(tokenizer.encode("x", add_special_tokens=False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    after = whole[start + len(plain) :]
    end = tokenizer.eos_token_id
    return whole[:start], after if end is None or after[-1:] == [end] else [*after, end]


def _plain_backend(tokenizer: Any, controls: set[str], after: str) -> Tokenizer:
    """A copy that reads control tokens as text and, after a cut, puts no blank before the first word."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls
    if after == "cut":
        spec["normalizer"] = _without_prefix(spec["normalizer"])
        spec["pre_tokenizer"] = _without_prefix(spec["pre_tokenizer"])
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer without what it writes before the first word."""
    if part is None or part["type"] == "Prepend":
        return None
    changes: dict[str, dict[str, Any]] = {
        "ByteLevel": {"add_prefix_space": False},
        "Metaspace": {"prepend_scheme": "never"},
    }
    part = {**part, **changes.get(part["type"], {})}
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part[key] = [kept for one in part[key] if (kept := _without_prefix(one)) is not None]
    return part
