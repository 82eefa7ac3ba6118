"""Ship: registered models, and the use of what was made."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.verbs.frame import SHIP, advised_screen, app, quiet_prefect
from tasks.answer import Sampling
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.targets import Target
    from tasks.answer import Answering

TARGET = "a run, NAME@champion, NAME/VERSION, an adapter folder, or a model as model.source takes it"

Json = Annotated[bool, Parameter(name="--json", negative=())]
Name = Annotated[str, Parameter(help="of the registered model")]
MaxTokens = Annotated[int, Parameter(help="longest answer (tokens)")]
Temperature = Annotated[float, Parameter(help="0 always takes the likeliest token")]
TopP = Annotated[float, Parameter(help="share of probability that is drawn from")]
System = Annotated[str | None, Parameter(help="a system prompt, in place of that of the training")]


@app.command(group=SHIP)
def models(name: Name | None = None, /, *, as_json: Json = False) -> None:
    """List registered models: versions, who is @champion, figures, run and age.

    Parameters
    ----------
    as_json
        print them as JSON, with all figures and tags, and nothing else
    """
    quiet_prefect()
    from flows import registered
    from tasks.config import TrackingSettings
    from tasks.register.versions import registered_versions
    from tasks.tracking import tracking_uri

    versions = registered_versions(TrackingSettings(), name)
    if as_json:
        print(json.dumps(registered.as_json(versions), indent=2))
    elif versions:
        registered.print_versions(Console(), versions, tracking_uri(TrackingSettings()))
    else:
        print("Nothing is registered yet: 'tunesmith finetune' registers what it makes.")


@app.command(group=SHIP)
def promote(name: Name, version: int, /) -> None:
    """Make a version @champion, whatever its figures are; 'tunesmith models' shows them.

    Parameters
    ----------
    version
        its number
    """
    quiet_prefect()
    from flows.registered import describe
    from tasks.config import TrackingSettings
    from tasks.register.champion import promote as move

    print(describe(move(TrackingSettings(), name, version)))


@app.command(group=SHIP)
def rollback(name: Name, /) -> None:
    """Give @champion back to the version that held it before."""
    quiet_prefect()
    from flows.registered import describe
    from tasks.config import TrackingSettings
    from tasks.register.champion import roll_back

    print(describe(roll_back(TrackingSettings(), name)))


@app.command(group=SHIP)
def chat(
    target: Annotated[str | None, Parameter(help=f"{TARGET}; the newest finished run by default")] = None,
    /,
    *,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = Sampling.temperature,
    top_p: TopP = Sampling.top_p,
) -> None:
    """Talk to a model: the chat template, system prompt and adapter as in training."""
    sampling = Sampling(max_tokens, temperature, top_p)
    quiet_prefect()
    from flows.chat import COMMANDS
    from flows.chat import chat as talk

    with suppress(ImportError):  # Python may be built without it; with it, input() knows the arrow keys
        import readline  # noqa: F401
    found, answering = _loaded(target)
    print(f"{found.name}   ({COMMANDS})")
    talk(answering, sampling, system, _typed, _written)


@app.command(group=SHIP)
def generate(
    target: Annotated[str, Parameter(help=TARGET)],
    /,
    *,
    prompt: str | None = None,
    system: System = None,
    max_tokens: MaxTokens = Sampling.max_tokens,
    temperature: Temperature = Sampling.temperature,
    top_p: TopP = Sampling.top_p,
    as_json: Json = False,
) -> None:
    """Answer one prompt on standard output, as it is written.

    Parameters
    ----------
    prompt
        the question; by default what comes on standard input
    as_json
        print answer, tokens and speed as JSON when it is done, and nothing else
    """
    sampling = Sampling(max_tokens, temperature, top_p)
    question = _prompt(prompt)
    quiet_prefect()
    from flows.chat import answer_once

    found, answering = _loaded(target)
    told = answer_once(answering, sampling, system, question, None if as_json else _written)
    print(json.dumps({"target": found.name, **told}, indent=2, ensure_ascii=False) if as_json else "")


@app.command(group=SHIP)
def serve(target: Annotated[str, Parameter(help=TARGET)], /, *, port: int = 8080) -> None:
    """Serve a model on this machine with OpenAI's API, by mlx_lm.server."""
    quiet_prefect()
    from flows.model_server import serve as hand_over
    from flows.targets import find_target

    with advised_screen(quiet=True):
        hand_over(find_target(target), port)


def _loaded(target: str | None) -> tuple[Target, Answering]:
    from flows.targets import find_target, newest_target
    from tasks.answer import Answering
    from tasks.progress import progress

    with advised_screen(quiet=True):
        found = newest_target() if target is None else find_target(target)
        with progress("loading"):
            model, adapter = found.model.path, found.adapter
            return found, Answering(model, adapter, found.template, found.system_prompt)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give --prompt, or pipe a text into the command")
    text = sys.stdin.read().strip() if given is None else given
    if not text:
        raise InputError("the prompt is empty; give --prompt, or pipe a text into the command")
    return text


def _typed() -> str:
    return input("> ")


def _written(text: str) -> None:
    print(text, end="", flush=True)
