"""Chats to token ids with an exact supervision mask.

A rendered chat is cut where the template writes a control token and where an answer begins; the
stretches between are encoded as plain text, so a row that spells `<|im_end|>` stays text, and no token
spans a question and its answer: training sees what generation will see. Without the cuts at answers
the ids are those of the whole text; a probe holds every tokenizer to that when it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.errors import InputError
from tasks.prepare.rows import Messages
from tasks.prepare.templates import ChatTemplate, Piece, TemplateError

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


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids up to where the last answer begins: what the model is given to write that answer.

    They are exactly the ids that stand before it in training. Turns from the last answer on are not
    used; without an answer, the whole chat is the prompt.

    Args:
        tokenizer: of transformers, or mlx-lm's wrapper around one.
        messages: the turns of a row.
    """
    return chat_encoder(tokenizer).prompt(messages)


@lru_cache(maxsize=4)
def chat_encoder(tokenizer: Any) -> ChatEncoder:
    """The encoder of a tokenizer, made once."""
    return ChatEncoder(tokenizer)


@dataclass(frozen=True)
class _Stretch:
    """Plain text between two cuts, or a control token (its id, and no text)."""

    text: str
    control: int | None
    supervised: bool
    after: str  # "start" of the chat, "control" token, or "cut" at an answer's edge


class ChatEncoder:
    """Encodes chats by one tokenizer and its template.

    Raises:
        InputError: the tokenizer has no `tokenizer.json` form, or encodes text between control tokens
            in a way that cannot be had piece by piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = getattr(tokenizer, "_tokenizer", None)
        if hasattr(inner, "apply_chat_template"):  # mlx-lm wraps the tokenizer of transformers
            tokenizer = inner
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InputError("the model has no fast tokenizer; convert it to one with a tokenizer.json")
        self.template = ChatTemplate(tokenizer)
        self._whole = tokenizer
        try:
            pieces = [*self.template.pieces(PROBE)]
        except TemplateError as error:
            raise InputError(f"no chat can be written for this model: {error}") from None
        controls = {piece.text.strip() for piece in pieces if piece.control is not None}
        self._plain = {after: _plain_backend(tokenizer, controls, after) for after in ("start", "cut")}
        self._plain["control"] = self._plain["start"]
        if not self._agrees_with_whole():
            self._plain["control"] = self._plain["cut"]
            if not self._agrees_with_whole():
                raise InputError("this tokenizer joins text across control tokens; use another base model")

    def rows(self, chats: Sequence[Messages], mask_prompt: bool = True) -> list[TokenRow]:
        """Token ids and supervision of each chat.

        With `mask_prompt` every answer and the token that ends it is supervised and nothing else; without
        it everything is.

        Raises:
            TemplateError: the template refuses a chat.
        """
        rows = self._encode([[*_stretches(self.template.pieces(chat), cut=True)] for chat in chats])
        return rows if mask_prompt else [(ids, [True] * len(ids)) for ids, _ in rows]

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids up to where the last answer begins; see `encode_prompt`."""
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        asked = messages[: answers[-1]] if answers else messages
        chat = [*asked, {"role": "assistant", "content": "?"}]
        [(ids, supervised)] = self.rows([chat])
        end = len(ids)
        while end and not supervised[end - 1]:
            end -= 1
        while end and supervised[end - 1]:
            end -= 1
        return ids[:end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        return str(self._whole.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, chats: list[list[_Stretch]]) -> list[TokenRow]:
        stretches = [stretch for chat in chats for stretch in chat]
        encoded = [[] if one.control is None else [one.control] for one in stretches]
        for after, backend in self._plain.items():
            mine = [i for i, one in enumerate(stretches) if one.control is None and one.after == after]
            texts = [stretches[i].text for i in mine]
            for i, encoding in zip(
                mine, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
            ):
                encoded[i] = encoding.ids
        place = 0
        rows = []
        for chat in chats:
            parts = encoded[place : place + len(chat)]
            place += len(chat)
            supervised = [one.supervised for one, ids in zip(chat, parts, strict=True) for _ in ids]
            rows.append(([token for ids in parts for token in ids], supervised))
        return rows

    def _agrees_with_whole(self) -> bool:
        pieces = [*self.template.pieces(PROBE)]
        [(ids, _)] = self._encode([[*_stretches(pieces, cut=False)]])
        text = "".join(piece.text for piece in pieces)
        return ids == list(self._whole.encode(text, add_special_tokens=False))


def _stretches(pieces: Iterator[Piece] | list[Piece], cut: bool) -> Iterator[_Stretch]:
    """Join the pieces between control tokens, and with `cut` between the edges of answers."""
    text, supervised, after = "", False, "start"
    for piece in pieces:
        if text and (piece.control is not None or (cut and piece.supervised != supervised)):
            yield _Stretch(text, None, supervised, after)
            text, after = "", "cut"
        supervised = piece.supervised
        if piece.control is not None:
            yield _Stretch("", piece.control, supervised, "")
            after = "control"
        else:
            text += piece.text
    if text:
        yield _Stretch(text, None, supervised, after)


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
