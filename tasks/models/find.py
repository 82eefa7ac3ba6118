"""A base model found again by its fingerprint, long after the run that used it."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.config import ModelSettings
from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.bundled import BUNDLED_NAME, BUNDLED_SOURCE
from tasks.models.fingerprints import folder_fingerprint
from tasks.models.folder import ModelFolder
from tasks.models.resolve import check_model, resolve_model


def find_base(name: str, fingerprint: str, settings: ModelSettings | None) -> ModelFolder:
    """The model folder with this fingerprint: from the cache, else made or downloaded as it once was.

    A GGUF file becomes float32 on CPU and stays quantised on a GPU: what was trained on the one is used
    on the other with the base that it was trained on.

    Args:
        name: of the base, for the messages and the result.
        settings: what named it when it was used; None when that is not known.

    Raises:
        InputError: it is not in the cache, and what the settings name is gone or another model by now.
    """
    source = settings.source if settings else name
    for folder in sorted((cache_dir() / "models").glob("*/config.json")):
        if folder_fingerprint(folder.parent) == fingerprint:
            return ModelFolder(folder.parent, name, fingerprint, source, settings)
    if settings is None:
        raise InputError(
            f"the base model {name} ({fingerprint}) is not in {cache_dir() / 'models'}, and nothing says "
            "where it came from; prepare any data for it once (model.source=…), so that it is imported again"
        )
    found = []
    for model in _as_it_may_have_been(settings):
        if model.fingerprint == fingerprint:
            return model
        found.append(model.fingerprint)
    raise InputError(
        f"model.source = '{source}' is {' or '.join(found)} now, the adapter was trained on {fingerprint}; "
        "give back the files it had then, or train again"
    )


def _as_it_may_have_been(settings: ModelSettings) -> Iterator[ModelFolder]:
    model = resolve_model(settings)
    yield model
    file = check_model(settings)
    if file is None or not file.is_file() or settings.quantize or settings.dequantize:
        return
    from tasks.models.gguf_import import import_gguf

    name = BUNDLED_NAME if settings.source == BUNDLED_SOURCE else file.stem
    for precision in ("float32", "stored"):
        folder = import_gguf(file, name, precision)
        if folder != model.path:
            yield ModelFolder(folder, name, folder_fingerprint(folder), settings.source, settings)
