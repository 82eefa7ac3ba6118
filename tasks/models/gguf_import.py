"""A GGUF file made into an MLX model folder: once, in the cache, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models.device import on_gpu
from tasks.models.fingerprints import file_digest
from tasks.models.gguf_check import GgufFile, read_gguf
from tasks.models.gguf_config import model_config, special_ids
from tasks.models.gguf_tokenizer import save_tokenizer
from tasks.models.gguf_weights import Precision, dense_dtype, mlx_weights, quantization, weight_names
from tasks.models.safety import read_config
from tasks.progress import progress
from tasks.publish import code_version, fingerprint, publishing, write_json

if TYPE_CHECKING:
    import mlx.core as mx

log = logging.getLogger(__name__)

SHARD_ELEMENTS = 500_000_000


def import_gguf(path: Path, name: str, precision: Precision | None = None) -> Path:
    """The MLX model folder of a GGUF file, made on the first call and reused after it.

    Args:
        path: the GGUF file.
        name: short and readable; the folder is `models/<name>-<fingerprint>` in the cache.
        precision: "float32" or "stored" (Q4_0, Q4_1 and Q8_0 stay quantised, the rest float16 or
            bfloat16); None for what suits the device: "stored" on a GPU, "float32" on CPU, whose
            other kernels are thirty times slower.

    Raises:
        InputError: the file is corrupt, or holds a model or tokenizer that cannot be represented.
    """
    precision = precision or usual_precision()
    target = _place(path, name, precision)
    if target.is_dir():
        log.info("%s: imported before, reusing %s", name, target)
        return target
    gguf = read_gguf(path)
    with publishing(target) as draft:
        write_folder(gguf, draft, name, precision)
    log.info("%s: imported from %s into %s", name, path, target)
    return target


def gguf_folder_config(path: Path, name: str, precision: Precision | None = None) -> dict[str, Any]:
    """The `config.json` of the folder that `import_gguf` makes, without making it.

    The file is read once for it, as that takes seconds; it is kept as `configs/<name>-<fingerprint>`.
    """
    if imported := imported_folder(path, name, precision):
        return read_config(imported)
    precision = precision or usual_precision()
    known = cache_dir() / "configs" / _place(path, name, precision).name
    if not known.is_dir():
        config = _folder_config(read_gguf(path), precision)
        with publishing(known) as draft:
            write_json(draft / "config.json", config)
    return read_config(known)


def imported_folder(path: Path, name: str, precision: Precision | None = None) -> Path | None:
    """The folder that `import_gguf` has made; None where it has not."""
    place = _place(path, name, precision or usual_precision())
    return place if place.is_dir() else None


def _place(path: Path, name: str, precision: Precision) -> Path:
    inputs = {"gguf": file_digest(path), "precision": precision, "code": code_version("models")}
    return cache_dir() / "models" / f"{as_folder_name(name)}-{fingerprint(inputs)}"


def usual_precision() -> Precision:
    """What suits the device: on a GPU weights as stored, on CPU, where only that is fast, float32."""
    return "stored" if on_gpu() else "float32"


def write_folder(gguf: GgufFile, folder: Path, name: str, precision: Precision) -> None:
    """Write config, tokenizer and weights of a GGUF file into a folder, which is left half made on error.

    Raises:
        InputError: it holds a model or tokenizer that cannot be represented.
    """
    config = _folder_config(gguf, precision)
    _check_fits(gguf, config)
    save_tokenizer(gguf, folder, config["max_position_embeddings"])
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special_ids(gguf))
    _write_weights(gguf, folder, name, config, precision)


def _folder_config(gguf: GgufFile, precision: Precision) -> dict[str, Any]:
    config = {**model_config(gguf), "dtype": dense_dtype(gguf, precision)}
    layers = quantization(gguf, precision)
    return {**config, "quantization": layers} if layers else config


def _check_fits(gguf: GgufFile, config: Mapping[str, Any]) -> None:
    """Hold names and shapes of the tensors to the model mlx_lm builds from the config."""
    try:
        expected = _expected_shapes(config)
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{gguf.path}: the metadata describes no possible model ({error})") from None
    found = {
        name: tuple(map(int, reversed(gguf.tensors[source].shape)))
        for source, name in weight_names(gguf).items()
    }
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is not part of it" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if faults:
        raise InputError(
            f"{gguf.path}: tensors and metadata do not describe one {config['model_type']} model: "
            f"{'; '.join(faults[:3])}; convert the model to GGUF again"
        )


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from tasks.models.mlx_lm_import import import_mlx_lm

    import_mlx_lm()
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(dict(config))
    # Parameters are lazy: no memory is taken for the shapes.
    model = model_class(args_class.from_dict(dict(config)))
    parameters = cast("dict[str, mx.array]", tree_flatten(model.parameters(), destination={}))
    return {name: tuple(value.shape) for name, value in parameters.items()}


def _write_weights(
    gguf: GgufFile, folder: Path, name: str, config: Mapping[str, Any], precision: Precision
) -> None:
    import mlx.core as mx

    shards = list(_shards(gguf))
    places: dict[str, str] = {}
    with progress(f"importing {name}", total=sum(map(len, shards))) as bar:
        for index, sources in enumerate(shards, 1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            )
            weights: dict[str, mx.array] = {}
            for source in sources:
                weights.update(mlx_weights(gguf, source, config, precision))
                bar.advance(1, source)
            mx.save_safetensors(str(folder / file), dict(sorted(weights.items())), {"format": "mlx"})
            places.update(dict.fromkeys(sorted(weights), file))
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _shards(gguf: GgufFile) -> Iterator[list[str]]:
    shard: list[str] = []
    elements = 0
    for name in weight_names(gguf):
        size = int(gguf.tensors[name].n_elements)
        if shard and elements + size > SHARD_ELEMENTS:
            yield shard
            shard, elements = [], 0
        shard.append(name)
        elements += size
    yield shard


def as_folder_name(name: str) -> str:
    """The name with whatever a folder's name should not have made a hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
