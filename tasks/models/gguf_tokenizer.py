"""The tokenizer in a GGUF file, rebuilt as tokenizer.json and tokenizer_config.json.

`tasks/fuse/gguf_tokens.py` is the way back, by the same table of rules.
Only byte-level BPE ("gpt2" in GGUF): its tokens, merges and splitting rule say everything. Text is
split by the rules llama.cpp has for `tokenizer.ggml.pre`, so that the same file gives the same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from tasks.errors import InputError
from tasks.models.gguf_check import GgufFile
from tasks.models.gguf_config import token_id
from tasks.publish import write_json

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How llama.cpp splits text before merging, by tokenizer.ggml.pre (src/llama-vocab.cpp).
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",),
    "qwen2": (rf"{CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",),
}
# Llama 3 looks a whole piece up before it merges, and starts with BOS unless the file says otherwise.
WHOLE_PIECES_FIRST = STARTS_WITH_BOS = {"llama-bpe"}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# Token types that are found in the text as they stand, and whether they are special.
MATCHED = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}


def save_tokenizer(gguf: GgufFile, folder: Path, max_length_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained` reads them.

    Raises:
        InputError: the kind of tokenizer or its splitting rule is not supported, or it is inconsistent.
    """
    build_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length_tokens,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(gguf),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _special(gguf, key)) is not None:
            settings[f"{name}_token"] = token
    if template := gguf.maybe("tokenizer.chat_template", str):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file; control tokens are special, user-defined ones are matched as text."""
    rule = _rule(gguf)
    tokens = _texts(gguf, "tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{gguf.path}: {len(tokens) - len(vocabulary)} tokens occur twice")
    merges = [_pair(gguf, merge) for merge in _texts(gguf, "tokenizer.ggml.merges")]
    whole = rule in WHOLE_PIECES_FIRST
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    except Exception as error:  # tokenizers 0.23 raises plain Exception
        raise InputError(f"{gguf.path}: tokens and merges do not fit together ({error})") from None
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[rule]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _frame(gguf)
    _add_tokens(tokenizer, gguf, tokens)
    return tokenizer


def _rule(gguf: GgufFile) -> str:
    kind = gguf.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise InputError(
            f"{gguf.path}: tokenizer '{kind}' cannot be rebuilt exactly from GGUF; supported is 'gpt2' "
            "(byte-level BPE). Give the model's hub name or folder instead"
        )
    rule = gguf.need("tokenizer.ggml.pre", str)
    if rule not in SPLITS:
        raise InputError(
            f"{gguf.path}: tokenizer.ggml.pre = '{rule}' is not a known splitting rule; supported are "
            f"{', '.join(SPLITS)}. Give the model's hub name or folder instead"
        )
    return rule


def _texts(gguf: GgufFile, key: str) -> list[str]:
    values = gguf.need(key, list)
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{gguf.path}: {key} holds more than text; convert the model to GGUF again")
    return values


def _pair(gguf: GgufFile, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise InputError(f"{gguf.path}: {merge!r} in tokenizer.ggml.merges is not a pair of tokens")
    return left, right


def _add_tokens(tokenizer: Tokenizer, gguf: GgufFile, tokens: list[str]) -> None:
    kinds = gguf.maybe("tokenizer.ggml.token_type", list) or []
    if kinds and len(kinds) != len(tokens):
        raise InputError(f"{gguf.path}: {len(tokens)} tokens but {len(kinds)} token types")
    marked = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in MATCHED]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in marked if MATCHED[k]]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t, k in marked if not MATCHED[k]]
    )


def _frame(gguf: GgufFile) -> processors.PostProcessor:
    bytes_back = processors.ByteLevel(trim_offsets=False)
    bos = _special(gguf, "bos") if _adds_bos(gguf) else None
    eos = _special(gguf, "eos") if gguf.maybe("tokenizer.ggml.add_eos_token", bool) else None
    if bos is None and eos is None:
        return bytes_back
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    vocabulary = _texts(gguf, "tokenizer.ggml.tokens")
    ids = [(token, vocabulary.index(token)) for token in dict.fromkeys((bos, eos)) if token]
    return processors.Sequence(
        [bytes_back, processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)]
    )


def _adds_bos(gguf: GgufFile) -> bool:
    said = gguf.maybe("tokenizer.ggml.add_bos_token", bool)
    return _rule(gguf) in STARTS_WITH_BOS if said is None else said


def _special(gguf: GgufFile, key: str) -> str | None:
    index = token_id(gguf, key)
    return None if index is None else _texts(gguf, "tokenizer.ggml.tokens")[index]
