"""What one model, base or tuned, does on the test rows; measured once for equal inputs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import EvaluateSettings
from tasks.models.folder import ModelFolder
from tasks.prepare.chats import load_rows, load_template
from tasks.prepare.splits import load_splits
from tasks.progress import progress
from tasks.publish import StepOutput, run_step, write_json

if TYPE_CHECKING:
    from tasks.models.load import LoadedModel

EVALUATION_FILE = "evaluation.json"


def measure(
    settings: EvaluateSettings, model: ModelFolder, adapter: StepOutput | None, data: StepOutput
) -> StepOutput:
    """Test loss and sample answers of a model with an adapter, or of the base alone (None).

    The output's `evaluation.json` holds `test_loss` (nats a supervised token, all test rows),
    `perplexity`, `chrf` (0 to 100), `exact_match` (share), `tokens_per_second` of generation, and
    `answers`: prompt, reference, answer and scores of the first `samples` test chats.
    """
    inputs = {
        "model": model.fingerprint,
        "adapter": adapter.fingerprint if adapter else None,
        "data": data.fingerprint,
        "settings": settings.model_dump(mode="json", exclude={"judge"}),
    }
    adapter_path = adapter.path if adapter else None
    return run_step(
        "evaluate", inputs, lambda draft: _measure(draft, settings, model.path, adapter_path, data)
    )


def _measure(
    draft: Path, settings: EvaluateSettings, model: Path, adapter: Path | None, data: StepOutput
) -> None:
    from tasks.models.load import load_model
    from tasks.train.adapters import load_adapter
    from tasks.train.loss import mean_loss
    from tasks.train.soft_prompt import prefix_ids, with_prefix

    loaded = load_model(model)
    who = "tuned" if adapter else "base"
    if adapter:
        load_adapter(loaded.model, adapter)
    test = with_prefix(load_splits(data.path)["test"], prefix_ids(loaded.model))
    test_loss = mean_loss(loaded.model, test, settings.batch_size, f"test loss, {who}")
    figures: dict[str, Any] = {"test_loss": test_loss, "perplexity": math.exp(test_loss)}
    if settings.samples:
        chats = [row for row in load_rows(data.path, "test") if "text" not in row][: settings.samples]
        figures |= _answers(loaded, chats, load_template(data.path), settings, who) if chats else {}
    write_json(draft / EVALUATION_FILE, figures)


def _answers(
    loaded: LoadedModel,
    chats: list[dict[str, Any]],
    template: str | None,
    settings: EvaluateSettings,
    who: str,
) -> dict[str, Any]:
    """Greedy answers to the chats' last questions, and their scores."""
    from tasks.evaluate.text_metrics import chrf, exact_match
    from tasks.prepare.tokenise import encode_prompt

    prompts = [
        encode_prompt(loaded.tokenizer, chat["messages"], chat.get("tools"), template) for chat in chats
    ]
    started = time.perf_counter()
    answers, generated = _generate(loaded, prompts, settings, who)
    seconds = time.perf_counter() - started
    table: list[dict[str, Any]] = [
        {
            "prompt": question,
            "reference": reference,
            "answer": answer,
            "chrf": chrf(answer, reference),
            "exact_match": exact_match(answer, reference),
        }
        for (question, reference), answer in zip(map(_last_exchange, chats), answers, strict=True)
    ]
    return {
        "chrf": sum(line["chrf"] for line in table) / len(table),
        "exact_match": sum(line["exact_match"] for line in table) / len(table),
        "tokens_per_second": generated / seconds,
        "answers": table,
    }


def _last_exchange(chat: dict[str, Any]) -> tuple[str, str]:
    """The last answer and the turn before it."""
    turns = chat["messages"]
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[last - 1]["content"] if last else "", turns[last]["content"]


def _generate(
    loaded: LoadedModel, prompts: list[list[int]], settings: EvaluateSettings, who: str
) -> tuple[list[str], int]:
    """Greedy answers by batched decoding, and the number of tokens generated."""
    from mlx_lm.generate import batch_generate

    from tasks.train.soft_prompt import prefix_ids

    prefix = prefix_ids(loaded.model)
    answers: list[str] = []
    generated = 0
    with progress(f"answers, {who}", total=len(prompts)) as bar:
        for start in range(0, len(prompts), settings.batch_size):
            group = [prefix + prompt for prompt in prompts[start : start + settings.batch_size]]
            made = batch_generate(loaded.model, loaded.tokenizer, group, max_tokens=settings.max_tokens)
            answers += [text.strip() for text in made.texts]
            generated += made.stats.generation_tokens
            bar.advance(len(group))
    return answers, generated
