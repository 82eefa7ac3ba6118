"""Token ids are those of the rendered text, the mask is exact, and no text forges a control token."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.errors import InputError
from tasks.prepare.templates import TemplateError, template_source
from tasks.prepare.tokenise import ChatEncoder, encode_prompt, load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = [
    "hello world, what does it do?",
    "Return a copy of the text.\n    indented   blanks",
    "user assistant",
]

Messages = list[dict[str, str]]


def byte_level(template: str | None, added: list[AddedToken] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's with ChatML's tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(WORDS * 20, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(added or [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def sentence_piece(template: str, legacy: bool) -> PreTrainedTokenizerFast:
    """A BPE that writes blanks as '▁' and puts one first: before every stretch as in Llama 2, or once."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if legacy:
        prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(prefix)
        backend.decoder = decoders.Replace("▁", " ")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    characters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=characters,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(WORDS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A model folder with nothing but a tokenizer, which is all that preparing reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level(CHATML)).save_pretrained(folder)
    return folder


def chat(*texts: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def supervised_texts(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[bool]) -> list[str]:
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run], skip_special_tokens=False) for on, run in runs if on]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(CHATML)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def whole_ids(tokenizer: Any, messages: Messages) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert isinstance(ids, list)
    return ids


def test_every_answer_and_its_end_of_turn_is_supervised_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, encoder: ChatEncoder
) -> None:
    messages = chat("hello", "Return a copy.", "and world?", "it do", system="be kind")
    [(ids, mask)] = encoder.rows([messages])
    assert supervised_texts(tokenizer, ids, mask) == ["Return a copy.<|im_end|>", "it do<|im_end|>"]
    assert ids == whole_ids(tokenizer, messages)


def test_without_masking_everything_is_supervised(encoder: ChatEncoder) -> None:
    [(ids, mask)] = encoder.rows([chat("hello", "world")], supervise="everything")
    assert mask == [False, *[True] * (len(ids) - 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=6))
def test_any_text_comes_back_from_its_supervised_tokens(texts: list[str]) -> None:
    tokenizer, encoder = SHARED
    messages = chat(*texts[: len(texts) // 2 * 2])
    [(ids, mask)] = encoder.rows([messages])
    answers = [turn["content"] + "<|im_end|>" for turn in messages if turn["role"] == "assistant"]
    assert supervised_texts(tokenizer, ids, mask) == answers
    assert tokenizer.decode(ids, skip_special_tokens=False) == encoder.template.render(messages)


@pytest.mark.parametrize("forged", ["<|im_end|>", "<|im_start|>system", "<|endoftext|>"])
def test_a_control_token_in_a_text_stays_text(
    tokenizer: PreTrainedTokenizerFast, encoder: ChatEncoder, forged: str
) -> None:
    plain = encoder.rows([chat("say it", "fine")])[0][0]
    [(ids, mask)] = encoder.rows([chat(f"say {forged} it", f"fine {forged}")])
    special = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert supervised_texts(tokenizer, ids, mask) == [f"fine {forged}<|im_end|>"]


def test_a_control_token_not_marked_special_stays_text_too() -> None:
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = byte_level(PHI, [AddedToken(name, special=False, rstrip=True) for name in names])
    encoder = ChatEncoder(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    [(ids, mask)] = encoder.rows([chat("what <|end|> is", "the <|end|>")])
    assert ids.count(end) == 2
    assert supervised_texts(tokenizer, ids, mask) == ["the <|end|><|end|>"]
    messages = chat("what is", "the end", "and", "then")
    assert encoder.rows([messages])[0][0] == whole_ids(tokenizer, messages)


def test_a_generation_prompt_that_ends_within_a_heading_leaves_it_whole() -> None:
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    template = PHI.replace("'<|assistant|>\\n'", "'<|assistant|>'")
    tokenizer = byte_level(template, [AddedToken(name, special=True, rstrip=True) for name in names])
    messages = chat("what is", "the end")
    [(ids, mask)] = ChatEncoder(tokenizer).rows([messages])
    assert ids == whole_ids(tokenizer, messages)
    assert supervised_texts(tokenizer, ids, mask) == ["the end<|end|>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_writes_a_blank_first_is_encoded_as_a_whole_would_be(legacy: bool) -> None:
    tokenizer = sentence_piece(INST, legacy)
    messages = chat("hello world", "Return a copy", "what", "it do")
    [(ids, mask)] = ChatEncoder(tokenizer).rows([messages])
    assert ids == whole_ids(tokenizer, messages)
    learnt = "".join(
        token for token, on in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True) if on
    )
    assert learnt == "▁Return▁a▁copy</s>▁it▁do</s>"


def test_a_template_that_trims_is_followed() -> None:
    tokenizer = sentence_piece(INST, legacy=False)
    encoder = ChatEncoder(tokenizer)
    assert encoder.rows([chat("a", "  it do \n")]) == encoder.rows([chat("a", "it do")])


def test_what_follows_the_generation_prompt_is_learnt() -> None:
    tokenizer = byte_level(
        THINK, [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    [(ids, mask)] = ChatEncoder(tokenizer).rows([chat("a", "b", "c", "d")])
    assert supervised_texts(tokenizer, ids, mask) == [
        "b<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]


def test_a_heading_is_not_learnt_though_the_template_knows_no_generation_prompt() -> None:
    tokenizer = byte_level(CHATML.split("{% if add_generation_prompt")[0])
    [(ids, mask)] = ChatEncoder(tokenizer).rows([chat("a", "b")])
    assert supervised_texts(tokenizer, ids, mask) == ["b<|im_end|>"]


def test_a_tokenizer_saved_with_truncation_and_padding_cuts_and_pads_nothing(encoder: ChatEncoder) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    messages = chat("hello world", "Return a copy of the text")
    assert ChatEncoder(tokenizer).rows([messages]) == encoder.rows([messages])


def test_a_template_that_rewrites_a_text_is_refused() -> None:
    added = [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    encoder = ChatEncoder(byte_level(THINK, added))
    with pytest.raises(TemplateError, match="rewrites the text"):
        encoder.rows([chat("a", "<think>hm</think>b")])


def test_a_template_that_drops_a_turn_is_refused() -> None:
    template = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    with pytest.raises(TemplateError, match="drops or repeats a turn"):
        ChatEncoder(byte_level(template)).rows([chat("a", "b", system="kind")])


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    tokenizer = byte_level(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    [(ids, mask)] = ChatEncoder(tokenizer).rows([chat("hello", "world")])
    assert supervised_texts(tokenizer, ids, mask) == ["world\n<|im_end|>"]


def test_a_model_without_a_template_gets_chatml(
    tokenizer: PreTrainedTokenizerFast, encoder: ChatEncoder
) -> None:
    bare = ChatEncoder(byte_level(None))
    messages = chat("hello", "world")
    assert template_source("model", byte_level(None))[0] == "ChatML"
    assert template_source("model", tokenizer)[1] is None
    assert bare.rows([messages]) == encoder.rows([messages])


def test_chatml_ends_a_turn_with_a_token_the_model_has() -> None:
    tokenizer = sentence_piece("", legacy=False)
    tokenizer.chat_template = None
    [(ids, mask)] = ChatEncoder(tokenizer).rows([chat("hello", "world")])
    assert supervised_texts(tokenizer, ids, mask) == ["world</s>"]


@pytest.mark.parametrize("template", [CHATML, THINK])
def test_a_prompt_is_what_stands_before_the_answer_in_training(template: str) -> None:
    added = [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    tokenizer = byte_level(template, added)
    messages = chat("hello <|im_end|>", "Return", "what", "  it do", system="be kind")
    [(ids, mask)] = ChatEncoder(tokenizer).rows([messages])
    last_answer = len(mask) - 1
    while not mask[last_answer]:
        last_answer -= 1
    while mask[last_answer]:
        last_answer -= 1
    assert encode_prompt(tokenizer, messages) == ids[: last_answer + 1]


def test_a_prompt_is_the_template_s_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    messages = chat("hello world", "Return a copy.")
    expected = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, messages) == expected
    assert encode_prompt(tokenizer, messages[:1]) == expected
    assert encode_prompt(TokenizerWrapper(tokenizer), messages) == expected


def test_mlx_lm_s_wrapper_does_not_change_a_prompt() -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    template = "{% if enable_thinking is defined %}{{ 'think: ' ~ enable_thinking }}{% endif %}" + CHATML
    tokenizer = byte_level(
        template, [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    messages = chat("hello world", "Return a copy.")
    assert encode_prompt(TokenizerWrapper(tokenizer), messages) == encode_prompt(tokenizer, messages)


def test_a_tokenizer_that_cannot_be_had_in_pieces_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatEncoder, "_agrees_with_whole", lambda self, pieces: False)
    with pytest.raises(InputError, match="joins text across control tokens"):
        ChatEncoder(tokenizer)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_encodes_the_same(tmp_path: Path, encoder: ChatEncoder) -> None:
    loaded = ChatEncoder(load_tokenizer(save_model(tmp_path / "model")))
    messages = chat("hello", "world")
    assert loaded.rows([messages]) == encoder.rows([messages])


SHARED = (byte_level(CHATML), ChatEncoder(byte_level(CHATML)))
