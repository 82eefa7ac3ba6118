"""A `Modelfile`, by which Ollama makes a model of a GGUF file: `ollama create NAME -f Modelfile`.

Ollama reads the chat template of a GGUF file only where it knows that very template; any other model
would be given the bare question. So the template is rewritten in Ollama's language (Go's) where it is
what most are: each turn between a beginning and an end that depend on its role alone.
The language: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.prepare.rows import Messages
from tasks.prepare.templates import ChatTemplate, TemplateError

ROLES = ("system", "user", "assistant")
MARK = "\ue100"
"""Of the private use area: no template writes it."""

OWN_TEMPLATE = "# No TEMPLATE here: Ollama takes the chat template of the GGUF file, where it knows that one."


@dataclass(frozen=True)
class ChatForm:
    """A chat template as what stands around each turn.

    Attributes:
        around: by role, the text before and after what is said.
        opening: what begins an answer.
        system: said by the template itself where a chat has no system prompt.
    """

    around: dict[str, tuple[str, str]]
    opening: str
    system: str | None


def modelfile(
    gguf: str,
    form: ChatForm | None,
    stops: Sequence[str],
    note: str,
    adapter: str | None = None,
    system_prompt: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the model's file, beside the Modelfile.
        form: of the chats; None to rely on the GGUF file.
        stops: texts that end an answer.
        note: in comments above, a sentence a line.
        adapter: name of a LoRA's GGUF file, beside the Modelfile.
        system_prompt: of the training; None for what the template says by itself, if anything.
    """
    lines = [*(f"# {line}" for line in note.splitlines()), f"FROM ./{gguf}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{go_template(form)}"""' if form else OWN_TEMPLATE)
    if system := system_prompt or (form.system if form else None):
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def chat_form(template: ChatTemplate, start: str | None = None) -> ChatForm | None:
    """The template taken apart; None where what it writes depends on more than the turns' roles.

    Args:
        start: what is put before every text anyway, and must not be said twice: the BOS token.
    """
    try:
        form = _taken_apart(template, start or "")
        if form is None or any('"""' in part or "{{" in part for part in _parts(form)):
            return None
        agrees = all(_written(form, chat) == _rendered(template, chat, start or "") for chat in _probes())
    except TemplateError:
        return None
    return form if agrees else None


def go_template(form: ChatForm) -> str:
    """The form in Go's template language, over `.Messages`."""
    turns = "".join(
        f'{{{{ {"if" if role == ROLES[0] else "else if"} eq .Role "{role}" }}}}'
        f"{form.around[role][0]}{{{{ .Content }}}}{form.around[role][1]}"
        for role in ROLES
    )
    return f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{form.opening}"


def _taken_apart(template: ChatTemplate, start: str) -> ChatForm | None:
    """What stands around each turn, found by rendering chats of placeholders."""
    rule, question, answer = ({"role": role, "content": f"{MARK}{role}{MARK}"} for role in ROLES)
    around = _literals(template.render([rule, question, answer, question]))
    if len(around) != 5:
        return None  # it drops a turn, or says one twice
    before_rule, between, after_question, after_answer, end = around
    end_of_answer = _literals(template.render([rule, question, answer]))[-1]
    before_question = after_answer.removeprefix(end_of_answer)
    form = ChatForm(
        around={
            "system": (before_rule.removeprefix(start), between.removesuffix(before_question)),
            "user": (before_question, end),
            "assistant": (after_question.removeprefix(end), end_of_answer),
        },
        opening=_literals(template.render([question], prompt=True))[-1].removeprefix(end),
        system=None,
    )
    unruled = _literals(template.render([question]))[0].removeprefix(start)
    if unruled == before_question:
        return form
    before, after = form.around["system"]
    said = unruled.removesuffix(after + before_question).removeprefix(before)
    # Without a rule nothing, or an empty one: neither can be told to Ollama.
    return replace(form, system=said) if said and said != unruled else None


def _literals(rendered: str) -> list[str]:
    """What the template itself writes before, between and after the turns."""
    return re.split(f"{MARK}[a-z]+{MARK}", rendered)


def _parts(form: ChatForm) -> list[str]:
    return [*(part for pair in form.around.values() for part in pair), form.opening, form.system or ""]


def _probes() -> list[Messages]:
    """Chats that the form has to write as the template does."""
    said = ("Be brief.", "What is 2 + 2?", "It is 4.\n\nNothing else.", "And twice that?", "8", "Thanks.")
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return [chat[1:2], chat[:2], chat[1:4], chat[:4], chat]


def _written(form: ChatForm, chat: Messages) -> str:
    if form.system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": form.system}, *chat]
    turns = "".join(
        form.around[turn["role"]][0] + turn["content"] + form.around[turn["role"]][1] for turn in chat
    )
    return turns + form.opening


def _rendered(template: ChatTemplate, chat: Messages, start: str) -> str:
    return template.render(chat, prompt=True).removeprefix(start)
