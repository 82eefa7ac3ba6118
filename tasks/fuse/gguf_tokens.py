"""A tokenizer as GGUF says it: tokens with their types, merges, splitting rule, special tokens, template.

Only byte-level BPE, whose tokens, merges and splitting rule say everything. The rule is found by what
the tokenizer does to text, in the table by which the import makes tokenizers from GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError
from tasks.models.gguf_tokenizer import CASELESS, CONTROL, GPT2, SPLITS, USER_DEFINED

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

NORMAL, UNUSED = 1, 5
"""Token types of GGUF, beside those of the import."""

ENDS = ("eos", "eot", "eom")
"""GGUF has room for three tokens that end an answer; llama.cpp knows further ones by their text."""


@dataclass(frozen=True)
class GgufTokens:
    """A tokenizer in GGUF's terms.

    Attributes:
        rule: `tokenizer.ggml.pre`, a key of `SPLITS`.
        tokens: (vocabulary,) texts; rows of the embedding without a token are named `[PAD<id>]`.
        types: (vocabulary,) of each token.
        merges: "left right", the first merged first.
        special: ids by GGUF's names bos, eos, eot, eom, unknown, padding.
        adds_bos, adds_eos: whether a text is framed in them.
        template: the chat template in Jinja.
    """

    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    template: str | None


def gguf_tokens(tokenizer: PreTrainedTokenizerFast, vocabulary: int, ends: Sequence[int]) -> GgufTokens:
    """The tokenizer in GGUF's terms.

    Args:
        vocabulary: rows of the embedding.
        ends: of `end_ids`.

    Raises:
        InputError: it is not byte-level BPE, or splits or normalises text as llama.cpp does not.
    """
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    where = Path(tokenizer.name_or_path)
    _refuse_other_than_byte_level(parts, where)
    tokens, types = _tokens(parts, vocabulary, where)
    return GgufTokens(
        rule=splitting_rule(parts["pre_tokenizer"], where),
        tokens=tokens,
        types=types,
        merges=_merges(parts["model"]["merges"], where),
        special=_special(tokenizer, ends),
        adds_bos=adds_bos(tokenizer),
        adds_eos=tokenizer.encode("a")[-1] == tokenizer.eos_token_id,
        template=own_template(tokenizer),
    )


def end_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end an answer: the tokenizer's own, then those of the model's configs."""
    from mlx_lm.utils import load_config

    said = load_config(folder).get("eos_token_id")
    others = said if isinstance(said, list) else [said]
    return [index for index in dict.fromkeys([tokenizer.eos_token_id, *others]) if index is not None]


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its BOS token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The tokenizer's chat template in Jinja; of several the one for chats without tools."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def add_tokens(writer: GGUFWriter, told: GgufTokens) -> None:
    """Write a tokenizer into a GGUF file's metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(told.rule)
    writer.add_token_list(told.tokens)
    writer.add_token_types(told.types)
    writer.add_token_merges(told.merges)
    for name, index in told.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(told.adds_bos)
    writer.add_add_eos_token(told.adds_eos)
    writer.add_add_space_prefix(False)
    if told.template:
        writer.add_chat_template(told.template)


def splitting_rule(pre_tokenizer: dict[str, Any] | None, where: Path) -> str:
    """`tokenizer.ggml.pre` for the pre_tokenizer of a tokenizer.json; `InputError` for an unknown one."""
    splits = tuple(_splits(pre_tokenizer or {"type": "nothing"}))
    for rule, known in SPLITS.items():
        if splits == tuple(map(_same_pattern, known)):
            return rule
    raise InputError(
        f"{where}: the tokenizer splits text by a rule that GGUF has no name for here ({list(splits)}); "
        f"known are {', '.join(SPLITS)}. Use the fused model with mlx-lm"
    )


def _splits(part: dict[str, Any]) -> Iterable[str]:
    """The patterns that a pre_tokenizer splits by, one after another."""
    kind = part["type"]
    if kind == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _splits(inner)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield _same_pattern(GPT2)
    elif kind == "Digits" and part.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        pattern = part["pattern"]
        yield _same_pattern(pattern["Regex"]) if "Regex" in pattern else json.dumps(pattern)
    else:
        yield json.dumps(part)


def _same_pattern(pattern: str) -> str:
    """One spelling of patterns that split alike.

    What no alternative matches is a piece of its own, so that a last `|\\s+` changes nothing.
    """
    return pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", CASELESS).removesuffix(r"|\s+")


def _refuse_other_than_byte_level(parts: dict[str, Any], where: Path) -> None:
    model = parts["model"]
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or "ByteLevel" not in json.dumps(parts["pre_tokenizer"])
    ):
        raise InputError(
            f"{where}: the tokenizer is not byte-level BPE but {_kind(model)}, which GGUF holds by scores "
            "that tokenizer.json does not have; it cannot be exported. Use the fused model with mlx-lm, or "
            "llama.cpp's own convert_hf_to_gguf.py on it"
        )
    normalizer = parts.get("normalizer")
    # llama.cpp normalises nothing: text that is not in NFC, as Qwen's would make it, gets other ids there.
    if normalizer and normalizer["type"] != "NFC":
        raise InputError(
            f"{where}: the tokenizer changes text before it is split ({normalizer['type']}), llama.cpp does "
            "not; it cannot be exported to GGUF. Use the fused model with mlx-lm"
        )


def _kind(model: dict[str, Any]) -> str:
    return "SentencePiece (BPE with bytes to fall back on)" if model.get("byte_fallback") else model["type"]


def _tokens(parts: dict[str, Any], vocabulary: int, where: Path) -> tuple[list[str], list[int]]:
    """Texts and types of all ids up to the embedding's rows."""
    added = {token["id"]: token for token in parts["added_tokens"]}
    texts = {index: text for text, index in parts["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if max(texts) >= vocabulary:
        raise InputError(
            f"{where}: the tokenizer has {max(texts) + 1:,} tokens, the model's embedding {vocabulary:,} "
            "rows; a token without a row cannot be exported"
        )
    types = dict.fromkeys(texts, NORMAL)
    types |= {index: CONTROL if token["special"] else USER_DEFINED for index, token in added.items()}
    ids = range(vocabulary)
    return [texts.get(index, f"[PAD{index}]") for index in ids], [types.get(index, UNUSED) for index in ids]


def _merges(merges: Sequence[str | list[str]], where: Path) -> list[str]:
    """Pairs in one text each; older tokenizer.json have them so already."""
    if not merges:
        raise InputError(
            f"{where}: the tokenizer has no merges, every byte is a token of its own; llama.cpp loads no "
            "such file"
        )
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _special(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int]) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(ENDS, ends, strict=False)),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: int(index) for name, index in found.items() if index is not None}
