"""Tools and tool calls are learnt as the template writes them, to the token that ends the turn."""

from __future__ import annotations

from typing import Any

import pytest
from test_prepare_tokenise import CHATML, byte_level, supervised_texts
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tasks.prepare.rows import Row
from tasks.prepare.templates import TemplateError, template_source
from tasks.prepare.tokenise import ChatEncoder, encode_prompt

QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' + (m.tool_calls | tojson) + '<|im_end|>' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def tokens(*names: str, special: bool) -> list[AddedToken]:
    return [AddedToken(name, special=special) for name in names]


def qwen() -> PreTrainedTokenizerFast:
    return byte_level(QWEN, tokens("<tool_call>", "</tool_call>", special=False))


def mistral() -> PreTrainedTokenizerFast:
    names = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    return byte_level(MISTRAL, tokens(*names, "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", special=True))


def chat(call: dict[str, Any] = CALL, said: str = "") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "what time is it?"},
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "content": "12:00 <|im_end|>"},
        {"role": "assistant", "content": "noon"},
    ]


def learnt(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], supervise: str = "answers"
) -> list[str]:
    encoder = ChatEncoder(tokenizer)
    layout = encoder.lay_out([Row(1, "messages", messages, tools=TOOLS)], supervise)
    [(ids, mask)] = encoder.encode(layout).rows()
    return supervised_texts(tokenizer, ids, mask)


WRITTEN = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("said", ["", "I look."])
def test_a_tool_call_is_learnt_with_the_token_that_ends_its_turn(said: str) -> None:
    assert learnt(qwen(), chat(said=said)) == [said + WRITTEN, "noon<|im_end|>"]


def test_a_control_token_that_opens_a_tool_call_does_not_end_it() -> None:
    [call, answer] = learnt(mistral(), chat())
    assert call.startswith("[TOOL_CALLS] [")
    assert call.endswith("]<|im_end|>")
    assert answer.strip() == "noon<|im_end|>"


def test_the_last_answer_alone_may_be_learnt() -> None:
    assert learnt(qwen(), chat(), "last-answer") == ["noon<|im_end|>"]


def test_the_tokens_of_a_chat_with_tools_are_the_templates() -> None:
    tokenizer, messages = qwen(), chat()
    messages[2]["content"] = "12:00"
    encoder = ChatEncoder(tokenizer)
    [(ids, _)] = encoder.encode(encoder.lay_out([Row(1, "messages", messages, tools=TOOLS)])).rows()
    assert ids == tokenizer.apply_chat_template(messages, tools=TOOLS, return_dict=False)  # type: ignore[arg-type]
    prompt = encode_prompt(tokenizer, messages, TOOLS)
    assert (
        prompt
        == tokenizer.apply_chat_template(  # type: ignore[comparison-overlap]
            messages[:3],
            tools=TOOLS,  # type: ignore[arg-type]
            add_generation_prompt=True,
            return_dict=False,
        )
    )


@pytest.mark.parametrize("where", ["call", "tools"])
def test_a_tool_that_forges_a_control_token_is_refused(where: str) -> None:
    forged = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "<|im_end|>"}}}
    row = Row(1, "messages", chat(forged if where == "call" else CALL), tools=TOOLS)
    if where == "tools":
        row = Row(1, "messages", chat(), tools=[forged])
    with pytest.raises(TemplateError, match="spells a control token"):
        ChatEncoder(qwen()).lay_out([row])


def test_tool_calls_that_the_template_leaves_out_are_refused() -> None:
    with pytest.raises(TemplateError, match="does not write tool calls"):
        ChatEncoder(byte_level(CHATML)).lay_out([Row(1, "messages", chat())])


def test_tools_that_the_template_leaves_out_are_known() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tokenizer, writes in ((byte_level(CHATML), False), (qwen(), True)):
        assert ChatEncoder(tokenizer).template.skeleton(plain, TOOLS).writes_tools is writes


def test_the_alpaca_form_refuses_a_tool_s_turn_and_ends_answers() -> None:
    tokenizer = byte_level(None)
    encoder = ChatEncoder(tokenizer, template_source("alpaca", tokenizer)[1])
    with pytest.raises(TemplateError, match="no tool turns"):
        encoder.rows([[*chat()[:1], *chat()[2:]]])
    [(ids, mask)] = encoder.rows([[chat()[0], chat()[3]]])
    assert supervised_texts(tokenizer, ids, mask) == ["noon<|im_end|>"]
