"""A soft prompt: learned vectors in front of every row, the model itself unchanged (Lester et al. 2021).

The vectors have token ids of their own, from the vocabulary's size upwards. A module that stands in for
the input embedding looks those ids up among the vectors, so rows and prompts only get them in front, and
training, validation, evaluation and generation need no other path through the model.

mlx-lm cannot load a soft prompt, and there is nothing to fuse: it is a part of the input, not of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from tasks.errors import InputError
from tasks.prepare.splits import TokenRows

KIND = "soft-prompt"

COMMON_TOKENS = 5000
"""Vectors begin as embeddings of tokens among the most common; BPE numbers its tokens in about that order."""


class PromptedEmbedding(nn.Module):
    """An input embedding whose ids from the vocabulary's size upwards are learned vectors."""

    def __init__(self, embedding: nn.Module, prompt_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = embedding
        width = embedding(mx.array([0])).shape[-1]
        self.prompt = mx.zeros((prompt_tokens, width))  # (prompt_tokens, hidden) float32

    @property
    def vocabulary(self) -> int:
        """Tokens that the model itself knows."""
        return int(self.embedding.weight.shape[0])

    @property
    def weight(self) -> mx.array:
        """The model's own embeddings, which some tied heads multiply with."""
        return cast(mx.array, self.embedding.weight)

    def __call__(self, ids: mx.array) -> mx.array:
        """Vectors of token ids: (batch, length) → (batch, length, hidden)."""
        learned = ids >= self.vocabulary
        known = self.embedding(mx.where(learned, 0, ids))
        vectors = self.prompt[mx.where(learned, ids - self.vocabulary, 0)].astype(known.dtype)
        return mx.where(learned[..., None], vectors, known)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Logits of a tied head: of the model's own tokens only."""
        return cast(mx.array, self.embedding.as_linear(hidden))


def put_in_front(model: nn.Module, prompt_tokens: int) -> None:
    """Replace the input embedding of a frozen model; the prompt alone is trainable.

    Raises:
        InputError: the model reads its token ids in more than one place, or in none that is known.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    if len(found) != 1:
        names = ", ".join(sorted(path for path, _ in found)) or "none"
        raise InputError(
            "train.method = 'soft-prompt': needs a model with one embedding of its input tokens, "
            f"this one has {len(found)} ({names}); use lora"
        )
    path, embedding = found[0]
    prompted = PromptedEmbedding(embedding, prompt_tokens)
    embedding.freeze()
    model.update_modules(tree_unflatten([(path, prompted)]))


def draw(model: nn.Module, seed: int) -> None:
    """Begin with the embeddings of random common tokens, drawn from `seed`: better than random vectors.

    Lester et al. 2021, arXiv:2104.08691, section 3.2: "sampled vocabulary" of the 5,000 most common.
    """
    prompted = cast(PromptedEmbedding, _prompted(model))
    among = min(prompted.vocabulary, COMMON_TOKENS)
    ids = mx.random.randint(0, among, (prompted.prompt.shape[0],), key=mx.random.key(seed))
    prompted.prompt = prompted.embedding(ids).astype(mx.float32)


def prefix_ids(model: nn.Module) -> list[int]:
    """The ids that go in front of every row and prompt of this model: none without a soft prompt."""
    prompted = _prompted(model)
    if prompted is None:
        return []
    return list(range(prompted.vocabulary, prompted.vocabulary + prompted.prompt.shape[0]))


def with_prefix(rows: TokenRows, ids: Sequence[int]) -> TokenRows:
    """The rows with `ids`, unsupervised, in front of each; the same tokens stay supervised."""
    if not ids:
        return rows
    starts = np.repeat(rows.offsets[:-1], len(ids))
    return TokenRows(
        tokens=np.insert(rows.tokens, starts, np.tile(np.asarray(ids, np.int32), len(rows))),
        offsets=rows.offsets + len(ids) * np.arange(len(rows) + 1),
        supervised=np.insert(rows.supervised, starts, False),
    )


def _prompted(model: nn.Module) -> PromptedEmbedding | None:
    return next((module for module in model.modules() if isinstance(module, PromptedEmbedding)), None)
