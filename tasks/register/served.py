"""A registered adapter as MLflow serves it: `mlflow.pyfunc.load_model`, `mlflow models serve`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from tasks.errors import InputError
from tasks.models.find import find_base
from tasks.prepare.rows import Messages
from tasks.train.use import read_use

if TYPE_CHECKING:
    from tasks.answer import Answering

ADAPTER = "adapter"
"""Under this name MLflow hands the adapter's folder to the model."""

FORMS = 'give rows as {"prompt": "…"}, or as {"messages": [{"role": "user", "content": "…"}]}'


class RegisteredModel(PythonModel):
    """Answers prompts and chats with the adapter of one version and the base it names.

    The base is not among the version's files: it is found in this machine's cache by its fingerprint, or
    imported or downloaded again from where it once came.
    """

    def __init__(self) -> None:
        self._answering: Answering | None = None
        self._one_at_a_time = threading.Lock()

    def load_context(self, context: PythonModelContext) -> None:
        """Load base and adapter.

        Raises:
            InputError: the base is gone, or is another model by now.
        """
        from tasks.answer import Answering

        folder = Path(context.artifacts[ADAPTER])
        use = read_use(folder)
        if use is None:
            raise InputError(f"{folder}: has no use.json, which names its base model; register it again")
        base = find_base(use.base_name, use.base_fingerprint, use.base)
        self._answering = Answering(base.path, folder, use.template, use.system_prompt)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """An answer to each row.

        Args:
            context: not used; MLflow's.
            model_input: a column `prompt` (one question, or a list of them) or `messages` (a chat). MLflow
                makes it of a list of such rows, or of one by itself; a bare list of texts it drops.
            params: `max_tokens`, `temperature` and `top_p` of `tasks.answer.Sampling`.

        Raises:
            MlflowException: a row has neither or both, or a chat cannot be answered.
        """
        from mlflow.exceptions import MlflowException

        from tasks.answer import Sampling

        try:
            sampling = Sampling(**(params or {}))
            rows = [model_input.iloc[place].to_dict() for place in range(len(model_input))]
            chats = [chat for place, row in enumerate(rows, 1) for chat in _chats(row, place)]
            if not chats:
                raise InputError(f"there is no row to answer: {FORMS}")
            return [self._answer(chat, sampling) for chat in chats]
        except InputError as error:
            # Of any other exception MLflow's server tells the caller only that it is unexpected.
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _answer(self, chat: Messages, sampling: Any) -> str:
        assert self._answering is not None, "MLflow calls load_context first"
        with self._one_at_a_time:
            return "".join(piece.text for piece in self._answering.stream(chat, sampling))


def _chats(row: Mapping[Any, Any], place: int) -> list[Messages]:
    """The chats of a row; MLflow fills a column that a row leaves out with None or NaN."""
    prompt, messages = row.get("prompt"), row.get("messages")
    prompts = [prompt] if isinstance(prompt, str) else _listed(prompt)
    turns = [dict(turn) for turn in _listed(messages)]
    if bool(prompts) == bool(turns):
        raise InputError(f"row {place}: {FORMS}")
    if prompts:
        return [[{"role": "user", "content": str(text)}] for text in prompts]
    for turn in turns:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise InputError(f"row {place}: a turn needs 'role' and 'content', both text; it is {turn}")
    return [turns]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else []
