"""A Modelfile says in Ollama's terms what the chat template says in Jinja, or leaves it to the GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, save_tiny_tokenizer

from tasks.fuse.modelfile import OWN_TEMPLATE, chat_form, go_template, modelfile
from tasks.prepare.templates import ALPACA, ChatTemplate
from tasks.prepare.tokenise import load_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And twice that?"},
]
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
SMOLLM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a tiny "
    "model.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NUMBERED = (
    "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SQUEEZED = CHATML.replace("message['content']", "message['content'] | replace('\n\n', '\n')")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_tiny_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def by_ollama(template: str, chat: list[dict[str, str]]) -> str:
    """What Ollama makes of a chat: the range over its messages, each by the branch of its role."""
    body, opening = re.fullmatch(
        r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    branches = re.split(r"\{\{ (?:else )?if eq \.Role \"(\w+)\" \}\}", body)[1:]
    by_role = dict(zip(branches[::2], branches[1::2], strict=True))
    return (
        "".join(by_role[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in chat) + opening
    )


@pytest.mark.parametrize(
    ("source", "start"),
    [(CHATML, ""), (LLAMA3, "<|im_start|>"), (SMOLLM, ""), (ALPACA.replace("TURN_END", "'<|im_end|>'"), "")],
)
def test_ollama_writes_the_chat_that_the_model_was_trained_on(
    tokenizer: Any, source: str, start: str
) -> None:
    template = ChatTemplate(tokenizer, source)
    form = chat_form(template, start)
    assert form is not None
    for chat in (CHAT, CHAT[:2]):
        assert start + by_ollama(go_template(form), chat) == template.render(chat, prompt=True)


def test_what_the_template_says_without_a_system_prompt_is_said_as_one(tokenizer: Any) -> None:
    form = chat_form(ChatTemplate(tokenizer, SMOLLM))
    assert form is not None
    assert form.system == "You are a tiny model."
    assert 'SYSTEM """You are a tiny model."""' in modelfile("m.gguf", form, [], "note")
    trained = modelfile("m.gguf", form, [], "note", system_prompt="Be brief.")
    assert 'SYSTEM """Be brief."""' in trained
    assert "tiny model" not in trained


def test_bos_is_not_said_twice_where_every_text_begins_with_it(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, "{{ bos_token }}" + CHATML)
    once, twice = chat_form(template, "<|im_start|>"), chat_form(template)
    assert once is not None
    assert by_ollama(go_template(once), CHAT) == ChatTemplate(tokenizer, CHATML).render(CHAT, prompt=True)
    assert twice is None or "<|im_start|><|im_start|>" in go_template(twice)


@pytest.mark.parametrize("source", [MISTRAL, NUMBERED, SQUEEZED, CHATML.replace("'<|im_start|>'", "'{{'")])
def test_a_template_that_is_more_than_turns_is_left_to_the_gguf_file(tokenizer: Any, source: str) -> None:
    form = chat_form(ChatTemplate(tokenizer, source))
    assert form is None
    assert OWN_TEMPLATE in modelfile("m.gguf", form, ["<|im_end|>"], "note")


def test_the_parts_of_a_modelfile_stand_one_below_the_other() -> None:
    assert modelfile("base.gguf", None, ["<|im_end|>", "<|eot|>"], "One.\nTwo.", "lora.gguf") == (
        "# One.\n# Two.\nFROM ./base.gguf\nADAPTER ./lora.gguf\n"
        f'{OWN_TEMPLATE}\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|eot|>"\n'
    )
