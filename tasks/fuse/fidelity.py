"""Whether two forms of a model are the same model: test loss and greedy tokens, of both, on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.prepare.splits import TokenRows, load_splits
from tasks.progress import progress

if TYPE_CHECKING:
    import mlx.nn as nn

PROOF_ROWS = 8
"""Rows on which the losses are compared."""

PROOF_PROMPTS, PROOF_TOKENS = 4, 16
"""Of so many of these rows the first answer is begun greedily, for so many tokens."""

SHORTEST_PROMPT = 8
"""Tokens; a row that is learnt whole has no question to begin with."""

TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, trimmed the lamp, and wrote one line in the "
    "log: wind from the north-west, two ships in sight, nothing else to report.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level, at about 93 degrees in a village 2000 metres higher, "
    "because the pressure of the air falls with the height.",
    "Q: Which is heavier, a litre of oil or one of water?\nA: The water; that is why the oil floats on it.",
)
"""What is compared where the rows that a model was trained on are not known."""


@dataclass(frozen=True)
class Behaviour:
    """What a model does with the proof rows.

    Attributes:
        loss: mean cross-entropy in nats over their supervised tokens.
        tokens: (prompts, tokens) ids, its greedy answers.
    """

    loss: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Difference:
    """A model's distance from a `Behaviour`.

    Attributes:
        loss: its own, in nats.
        relative: |its loss - the expected| / the expected, or / 1 nat where that is less: rounding moves a
            small loss by as many nats as a large one.
        tokens: share of the expected greedy tokens in whose place it would choose another, given the
            same text before. Zero means that both write the same answers.
    """

    loss: float
    relative: float
    tokens: float


def proof_rows(data: Path | None, model: Path) -> TokenRows:
    """The first test rows of prepared data; without data, texts of our own in the model's tokens."""
    if data is not None:
        return load_splits(data)["test"].first(PROOF_ROWS)
    from tasks.prepare.tokenise import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows = [list(tokenizer.encode(text)) for text in TEXTS]
    return TokenRows.from_rows([(ids, [True] * len(ids)) for ids in rows])


def observe(network: nn.Module, rows: TokenRows) -> Behaviour:
    """Loss and greedy answers of a model."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from tasks.train.evaluating import evaluating
    from tasks.train.loss import mean_loss

    loss = mean_loss(network, rows, PROOF_ROWS, "test loss")
    answers: list[list[int]] = []
    with progress("greedy answers", total=PROOF_PROMPTS) as bar, evaluating(network):
        for prompt in prompts(rows):
            steps = generate_step(mx.array(prompt), network, max_tokens=PROOF_TOKENS)
            answers.append([int(token) for token, _ in steps])
            bar.advance()
    return Behaviour(loss, answers)


def compare(network: nn.Module, rows: TokenRows, expected: Behaviour) -> Difference:
    """How far a model is from what was observed of another on the same rows."""
    from tasks.train.evaluating import evaluating
    from tasks.train.loss import mean_loss

    loss = mean_loss(network, rows, PROOF_ROWS, "test loss")
    pairs = list(zip(prompts(rows), expected.tokens, strict=True))
    with evaluating(network):
        other = sum(_chosen_otherwise(network, prompt, answer) for prompt, answer in pairs)
    count = sum(len(answer) for answer in expected.tokens)
    return Difference(loss, abs(loss - expected.loss) / max(expected.loss, 1.0), other / count)


def prompts(rows: TokenRows) -> list[list[int]]:
    """Token ids up to the first supervised one, and at least `SHORTEST_PROMPT` where there are so many."""
    found = []
    for index in range(min(PROOF_PROMPTS, len(rows))):
        tokens, supervised = rows.row(index)
        first = int(supervised.argmax()) if supervised.any() else len(tokens)
        found.append([int(token) for token in tokens[: max(first, SHORTEST_PROMPT)]])
    return found


def _chosen_otherwise(network: nn.Module, prompt: list[int], answer: list[int]) -> int:
    """Tokens of the answer that this model would not choose, in one pass over prompt and answer."""
    import mlx.core as mx

    from tasks.train.supervised import supervised_logits

    inputs = mx.array([prompt + answer[:-1]])
    positions = mx.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
    chosen = mx.argmax(supervised_logits(network, inputs, positions), axis=-1)  # (answer,)
    return int((chosen != mx.array(answer)).sum())
