"""A model folder as one GGUF file, as llama.cpp and Ollama read it, written with the `gguf` package.

mlx-lm's own writer (0.32.2) hard-codes the tokenizer's kind, writes neither merges nor chat template,
and leaves out head_dim and Llama 3's rope scaling: its files do not load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.fuse.gguf_metadata import ROPE_FREQS, add_metadata, gguf_architecture, rope_factors
from tasks.fuse.gguf_tokens import add_tokens, end_ids, gguf_tokens
from tasks.fuse.gguf_weights import Kind, as_gguf, placed, stored_bytes, tensor_kind
from tasks.progress import progress

if TYPE_CHECKING:
    import mlx.core as mx
    from gguf import GGUFWriter

    from tasks.models.load import LoadedModel


def write_gguf(path: Path, folder: Path, name: str, kind: Kind) -> None:
    """Write a model folder, quantised or not, as a GGUF file; what is quantised is dequantised first.

    Tensor by tensor: beside the model itself no more than one of them is in memory.

    Args:
        path: of the file, which must not exist.
        name: what the file calls the model.
        kind: of the matrices; vectors are float32 always.

    Raises:
        InputError: the architecture, a setting or the tokenizer has no equivalent in GGUF, with the reason.
    """
    from gguf import GGUFWriter
    from mlx_lm.utils import dequantize_model

    from tasks.models.load import load_model
    from tasks.prepare.tokenise import load_tokenizer

    loaded = load_model(folder)
    args: Any = loaded.model.args
    writer = GGUFWriter(path, gguf_architecture(loaded.config["model_type"]))
    add_metadata(writer, args, loaded.config.get("max_position_embeddings"), name, kind)
    tokenizer = load_tokenizer(folder)
    add_tokens(writer, gguf_tokens(tokenizer, args.vocab_size, end_ids(folder, tokenizer)))
    dequantize_model(loaded.model)
    _write_tensors(writer, loaded, args, name, kind)


def _write_tensors(writer: GGUFWriter, loaded: LoadedModel, args: Any, name: str, kind: Kind) -> None:
    from mlx.utils import tree_flatten

    weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    names = placed(sorted(weights))
    kinds = {each: tensor_kind(each, weights[each].shape, kind) for each in names}
    factors = rope_factors(args)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
    for each, target in names.items():
        shape = weights[each].shape
        size = stored_bytes(shape, kinds[each])
        writer.add_tensor_info(target, shape, np.dtype(np.float32), size, raw_dtype=kinds[each])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        if factors is not None:
            writer.write_tensor_data(factors)
        with progress(f"writing {name}.gguf", total=len(names)) as bar:
            for each in names:
                writer.write_tensor_data(as_gguf(each, weights[each], kinds[each], args))
                bar.advance()
    finally:
        writer.close()
