"""Base or tuned model in the lm-evaluation-harness, through mlx_lm's own model class for it.

The harness is an extra (`pip install 'tunesmith[harness]'`). Its tasks come with it; their questions are
hub data sets, which it downloads, or files that a task's YAML names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import InputError, StepError
from tasks.models.folder import ModelFolder
from tasks.publish import StepOutput, run_step, write_json

if TYPE_CHECKING:
    from tasks.models.load import LoadedModel

SCORES_FILE = "scores.json"

SEED = 1234
"""The harness's own default; everything that it draws is drawn from it."""

EXTRA = "the lm-evaluation-harness is not installed: pip install 'tunesmith[harness]'"


def harness_scores(
    model: ModelFolder,
    adapter: Path | None,
    tasks: Sequence[str],
    limit: int | None,
    shots: int | None,
    batch_size: int,
) -> StepOutput:
    """Scores of a model with an adapter, or of the base alone (None), measured once for equal inputs.

    The output's `scores.json` holds the numbers of every task by `task/metric`, standard errors among
    them as `task/metric_stderr`.

    Args:
        tasks: names of the harness's tasks, or YAML files of others.
        limit: questions a task; all by default.
        shots: worked examples before each question; by default what the task says.

    Raises:
        InputError: the harness is not installed, does not know a task, or cannot run the adapter.
        StepError: it fails, as when its questions cannot be downloaded.
    """
    manager = _task_manager(tasks)
    inputs = {
        "model": model.fingerprint,
        "adapter": _contents(adapter) if adapter else None,
        "tasks": {name: _contents(Path(name)) if _is_file(name) else None for name in tasks},
        "limit": limit,
        "shots": shots,
        "batch_size": batch_size,
        "harness": _version(),
    }

    def make(draft: Path) -> None:
        loaded = _loaded(model, adapter)
        write_json(draft / SCORES_FILE, _scores(loaded, manager, tasks, limit, shots, batch_size))

    return run_step("evaluate", inputs, make)


def _task_manager(tasks: Sequence[str]) -> Any:
    """The harness's list of tasks, all of those asked for among them."""
    if find_spec("lm_eval") is None:
        raise InputError(EXTRA)
    if not tasks:
        raise InputError("--tasks: name one of the harness's tasks, as arc_easy")
    manager = all_tasks()
    unknown = [name for name in tasks if not _is_file(name) and not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"--tasks {' '.join(unknown)}: not known to the lm-evaluation-harness {_version()}; "
            "'lm_eval ls tasks' lists them"
        )
    return manager


@cache
def all_tasks() -> Any:
    """Every task that comes with the harness: it reads some ten thousand files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _loaded(model: ModelFolder, adapter: Path | None) -> LoadedModel:
    from tasks.models.load import load_model
    from tasks.train.adapters import load_adapter, read_adapter_config
    from tasks.train.soft_prompt import KIND

    if adapter and read_adapter_config(adapter)["fine_tune_type"] == KIND:
        raise InputError(f"{adapter}: the harness tokenises by itself and cannot put a {KIND} in front")
    loaded = load_model(model.path)
    if adapter:
        load_adapter(loaded.model, adapter)
    return loaded


def _scores(
    loaded: LoadedModel,
    manager: Any,
    tasks: Sequence[str],
    limit: int | None,
    shots: int | None,
    batch_size: int,
) -> dict[str, float]:
    from lm_eval import simple_evaluate

    subject = _subject(loaded, batch_size)
    with _told_as_step_error():
        found = simple_evaluate(
            model=subject,
            tasks=list(tasks),
            task_manager=manager,
            apply_chat_template=subject.use_chat_template,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    return _flat(found["results"])


def _subject(loaded: LoadedModel, batch_size: int) -> Any:
    """mlx_lm's class for the harness around a model that is loaded already.

    Its own constructor (mlx-lm 0.32.2) can load neither an adapter nor a base as this program does.
    """
    from lm_eval.api.model import LM
    from mlx_lm.evaluate import MLXLM

    subject = MLXLM.__new__(MLXLM)
    LM.__init__(subject)
    subject._model, subject.tokenizer = loaded.model, loaded.tokenizer
    subject._max_tokens, subject._batch_size, subject._sampler = None, batch_size, None
    subject.use_chat_template = loaded.tokenizer.chat_template is not None
    return subject


@contextmanager
def _told_as_step_error() -> Iterator[None]:
    """Whatever the harness raises, in a line."""
    try:
        yield
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise StepError(f"the lm-evaluation-harness failed: {type(error).__name__}: {line}") from error


def _flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`{"arc_easy": {"acc,none": 0.5}}` as `{"arc_easy/acc": 0.5}`; a filter's name stays, unless none."""
    flat = {}
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, chosen = name.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and chosen:
                flat[f"{task}/{metric}" + (f"/{chosen}" if chosen != "none" else "")] = float(value)
    return flat


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _contents(path: Path) -> str:
    """A digest of a file, or of a folder's files."""
    import hashlib

    if not path.exists():
        raise InputError(f"{path}: no such file")
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
