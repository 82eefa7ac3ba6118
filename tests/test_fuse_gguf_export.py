"""What is exported as GGUF is read back as the same model, or is not published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, save_model
from test_models_gguf import tiny_config, tiny_tokens

from tasks.config import TrainSettings
from tasks.errors import InputError, StepError
from tasks.fuse import gguf_export
from tasks.fuse.fidelity import Behaviour, observe, proof_rows
from tasks.fuse.gguf_export import EXPORT_FILE, MODELFILE, export_gguf, export_gguf_lora
from tasks.fuse.gguf_model import write_gguf
from tasks.fuse.gguf_weights import Kind
from tasks.models.folder import ModelFolder
from tasks.models.gguf_check import read_gguf
from tasks.models.gguf_config import llama3_factors, model_config
from tasks.models.gguf_import import import_gguf
from tasks.models.load import load_model
from tasks.prepare.tokenise import load_tokenizer
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter, load_adapter, save_adapter

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_folder(
    folder: Path, model_type: str = "llama", tied: bool = True, add_bos: bool = False, **changes: Any
) -> ModelFolder:
    """A random model with byte-level BPE of three merges; six rows of the embedding have no token."""
    known = {"mistral": "llama"}.get(model_type, model_type)
    tokens, _, _ = tiny_tokens()
    ends = [tokens.index("<|end|>"), tokens.index("[note]")]
    config = {**tiny_config(known, tied), "vocab_size": 268, "model_type": model_type, "eos_token_id": ends}
    config = {key: value for key, value in (config | changes).items() if value is not None}
    model_class, arguments = _get_classes(config)
    mx.random.seed(5)
    network = model_class(arguments.from_dict(config))
    weights = [
        (name, mx.random.normal(array.shape) * 0.2) for name, array in tree_flatten(network.parameters())
    ]
    network.load_weights([(n, w + 1 if w.ndim == 1 and "norm" in n else w) for n, w in weights])
    folder.mkdir()
    save_model(folder, network)
    (folder / "config.json").write_text(json.dumps(config))
    save_merging_tokenizer(folder, add_bos)
    return ModelFolder(folder, f"tiny-{model_type}", f"{folder}", str(folder))


def save_merging_tokenizer(
    folder: Path, add_bos: bool = False, pre: Any = None, normalizer: Any = None
) -> None:
    """The tokens of the import's tests, as a model folder has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, merges, kinds = tiny_tokens()
    plain = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    tokenizer = Tokenizer(models.BPE(vocab=plain, merges=[tuple(merge.split()) for merge in merges]))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("[note]", normalized=False, special=False)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[-2:]])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokens.index("<|start|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def written(folder: Path, file: Path, kind: Kind = "f32") -> Path:
    """The file alone, without the proof."""
    write_gguf(file, folder, "tiny", kind)
    return file


def exported(folder: Path, out: Path, kind: Kind = "f32") -> Path:
    rows = proof_rows(None, folder)
    return export_gguf(out, folder, "tiny", kind, rows, observe(load_model(folder).model, rows)).file


@pytest.mark.parametrize(
    ("model_type", "tied", "kind"),
    [
        ("llama", True, "f32"),
        ("llama", True, "f16"),
        ("llama", False, "bf16"),
        ("llama", True, "q8_0"),
        ("mistral", False, "f32"),
        ("qwen2", True, "f32"),
        ("qwen3", False, "q8_0"),
    ],
)
def test_what_is_exported_is_read_back_with_equal_weights_and_token_ids(
    tmp_path: Path, model_type: str, tied: bool, kind: Kind
) -> None:
    model = tiny_folder(tmp_path / "model", model_type, tied)
    file = exported(model.path, tmp_path / "out", kind)
    back = import_gguf(file, "back", "float32")
    ours = dict(tree_flatten(load_model(model.path).model.parameters()))
    theirs = dict(tree_flatten(load_model(back).model.parameters()))
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        stored = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else kind.upper()]
        rounded = gguf.dequantize(gguf.quants.quantize(np.array(array), stored), stored)
        # Rows are permuted in the file, and blocks lie within rows: rounding is the same.
        np.testing.assert_array_equal(np.array(theirs[name]), rounded, err_msg=name)
    before, after = load_tokenizer(model.path), load_tokenizer(back)
    for text in ("hell hello 1234 [note]<|start|>he\n\n<|end|>", "Größe 😀"):
        assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template
    assert after.eos_token == "<|end|>"


def test_the_names_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    for model_type in ("llama", "qwen2", "qwen3"):
        model = tiny_folder(tmp_path / model_type, model_type, tied=False)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, model_type.upper()), 2)
        parameters = dict(tree_flatten(load_model(model.path).model.parameters()))
        expected = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in parameters}
        assert set(read_gguf(written(model.path, tmp_path / f"{model_type}.gguf")).tensors) == expected


def test_sizes_tokens_and_flags_stand_in_the_file(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "qwen3", add_bos=True)
    said = read_gguf(written(model.path, tmp_path / "tiny.gguf", "f16")).metadata
    tokens, merges, _ = tiny_tokens()
    assert said["qwen3.attention.key_length"] == said["qwen3.rope.dimension_count"] == 32
    assert said["qwen3.context_length"] == 128
    assert said["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert said["qwen3.rope.freq_base"] == 5000
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert said["tokenizer.ggml.pre"] == "smollm"
    assert said["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{index}]" for index in range(262, 268))]
    assert said["tokenizer.ggml.token_type"] == [1] * 259 + [4, 3, 3] + [5] * 6
    assert said["tokenizer.ggml.merges"] == merges
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert said["tokenizer.ggml.eos_token_id"] == tokens.index("<|end|>")
    assert said["tokenizer.ggml.eot_token_id"] == tokens.index("[note]")
    assert said["tokenizer.chat_template"] == TEMPLATE


def test_rope_scalings_come_back(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for index, scaling in enumerate((LLAMA3, {"rope_type": "linear", "factor": 2.0}, yarn)):
        model = tiny_folder(tmp_path / f"{index}", rope_scaling=scaling)
        file = read_gguf(written(model.path, tmp_path / f"{index}.gguf"))
        assert scaling.items() <= model_config(file)["rope_scaling"].items()
    factors = read_gguf(tmp_path / "0.gguf").tensors["rope_freqs.weight"].data
    np.testing.assert_allclose(factors, llama3_factors(16, 5000.0, 8.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "other than Llama 3's"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 8}},
            "YaRN with values of its own",
        ),
        ({"rope_traditional": True}, "rope_traditional"),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "sliding window attention",
        ),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"vocab_size": 261}, "262 tokens, the model's embedding 261 rows"),
    ],
)
def test_what_gguf_cannot_say_is_refused_and_nothing_is_left(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    model = tiny_folder(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=reason):
        export_gguf(tmp_path / "out" / "here", model.path, "tiny", "f32", *nothing_expected(model))
    assert not list((tmp_path / "out").iterdir())


def nothing_expected(model: ModelFolder) -> tuple[Any, Behaviour]:
    return proof_rows(None, model.path), Behaviour(1.0, [[1]] * 4)


def test_an_architecture_that_is_not_exported_is_named(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", "smollm3", head_dim=16)
    with pytest.raises(InputError, match=r"'smollm3' cannot be exported.*llama, mistral, qwen2, qwen3"):
        export_gguf(tmp_path / "out", model.path, "tiny", "f32", *nothing_expected(model))


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    odd_split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    behaviour = pre_tokenizers.Split(Regex(r"\p{N}"), "merged_with_previous")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pre": pre_tokenizers.Sequence([odd_split, to_bytes])}, "no name for"),
        ({"pre": pre_tokenizers.Sequence([behaviour, to_bytes])}, "no name for"),
        ({"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "no name for"),
        ({"pre": pre_tokenizers.Metaspace()}, "not byte-level BPE"),
        ({"normalizer": normalizers.Lowercase()}, r"changes text before it is split \(Lowercase\)"),
    ]
    model = tiny_folder(tmp_path / "model")
    for parts, reason in cases:
        save_merging_tokenizer(model.path, **parts)
        with pytest.raises(InputError, match=reason):
            export_gguf(tmp_path / "out", model.path, "tiny", "f32", *nothing_expected(model))


def test_the_rules_of_the_families_are_known_by_what_their_tokenizers_do() -> None:
    from tasks.fuse.gguf_tokens import splitting_rule

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    caseless = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    known = {
        "llama-bpe": [split(rf"{caseless}|\p{{N}}{{1,3}}|{rest}"), to_bytes],
        "qwen2": [split(rf"{caseless}|\p{{N}}|{rest}"), to_bytes],
        "smollm": [digits, gpt2],
        "gpt-2": [gpt2],
    }
    for rule, parts in known.items():
        assert splitting_rule({"type": "Sequence", "pretokenizers": parts}, Path("here")) == rule


def test_a_file_that_does_not_compute_what_the_adapter_did_is_not_published(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    rows = proof_rows(None, model.path)
    true = observe(load_model(model.path).model, rows)
    others = [[(token + 1) % 268 for token in answer] for answer in true.tokens]
    for wrong, reason in (
        (Behaviour(true.loss + 0.006, true.tokens), r"perplexity is 0\.60% from the adapter's"),
        (Behaviour(true.loss, others), r"chooses \d+\.\d% of the adapter's greedy tokens otherwise"),
    ):
        with pytest.raises(StepError, match=rf"{reason}.*nothing was written"):
            export_gguf(tmp_path / "out" / "here", model.path, "tiny", "f32", rows, wrong)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_whose_tokenizer_gives_other_ids_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder(tmp_path / "model")
    monkeypatch.setattr("tasks.fuse.gguf_tokens._merges", lambda *_: ["h e"])
    monkeypatch.setattr(gguf_export, "ODD_TEXTS", ("hell hello",))
    with pytest.raises(StepError, match="gives other ids than the model's for 'hell hello'"):
        export_gguf(tmp_path / "out" / "here", model.path, "tiny", "f32", *nothing_expected(model))
    assert not list((tmp_path / "out").iterdir())


def test_a_tokenizer_of_bytes_alone_is_refused(tmp_path: Path, tiny_model: ModelFolder) -> None:
    with pytest.raises(InputError, match="no merges, every byte is a token"):
        export_gguf(tmp_path / "out", tiny_model.path, "tiny", "f32", *nothing_expected(tiny_model))


def test_a_number_beyond_float16_is_refused_there_and_kept_in_bf16(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    network = load_model(model.path).model
    network.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    save_model(model.path, network)
    with pytest.raises(InputError, match=r"down_proj.weight holds 1e\+06, beyond float16's.*--type bf16"):
        written(model.path, tmp_path / "f16.gguf", "f16")
    assert written(model.path, tmp_path / "bf16.gguf", "bf16").is_file()


def test_matrices_whose_rows_are_no_blocks_are_float16_in_a_q8_0_file(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", intermediate_size=80)
    tensors = read_gguf(written(model.path, tmp_path / "tiny.gguf", "q8_0")).tensors
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_a_quantised_model_is_exported_dequantised(tmp_path: Path) -> None:
    from tasks.config import QuantizeSettings
    from tasks.models.quantise import quantised_folder

    model = tiny_folder(tmp_path / "model")
    folder = quantised_folder(model.path, "tiny", QuantizeSettings(bits=4, group_size=32))
    back = load_model(import_gguf(written(folder, tmp_path / "tiny.gguf"), "back", "float32")).model
    expected = dict(tree_flatten(load_model(folder).model.parameters()))
    for name, array in tree_flatten(back.parameters()):
        np.testing.assert_allclose(np.array(array), np.array(expected[name]), atol=1e-7, err_msg=name)


def test_the_figures_of_the_proof_lie_beside_the_file(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    file = exported(model.path, tmp_path / "out", "q8_0")
    assert {path.name for path in file.parent.iterdir()} == {"tiny-Q8_0.gguf", MODELFILE, EXPORT_FILE}
    told = json.loads((file.parent / EXPORT_FILE).read_text())
    assert told["kind"] == "q8_0"
    assert told["export"]["loss"] == pytest.approx(told["adapter"]["loss"], rel=0.02)


def adapter_of(folder: Path, model: ModelFolder, method: str = "lora", **settings: Any) -> Path:
    chosen = TrainSettings.model_validate({"method": method, "num_layers": 1, "rank": 4, **settings})
    network = load_model(model.path).model
    add_adapter(network, adapter_config(chosen, 2), 0)
    mx.random.seed(9)
    weights = {name: mx.random.normal(array.shape) for name, array in adapter_weights(network).items()}
    folder.mkdir()
    save_adapter(folder, weights, adapter_config(chosen, 2))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_lora_in_gguf_is_the_adapter_over_the_tensors_of_its_base(tmp_path: Path, model_type: str) -> None:
    """W + alpha / rank * B A over the base's file, as llama.cpp computes it, is the fused model's file."""
    from tasks.fuse.merge import merge_layers

    model = tiny_folder(tmp_path / "model", model_type)
    adapter = adapter_of(tmp_path / "adapter", model, scale=0.3)
    lora = read_gguf(export_gguf_lora(tmp_path / "lora", model, adapter, "tiny", None, None).file)
    assert (lora.metadata["general.type"], lora.metadata["adapter.type"]) == ("adapter", "lora")
    assert lora.metadata["general.architecture"] == model_type
    base = read_gguf(written(model.path, tmp_path / "base.gguf")).tensors
    network = load_model(model.path).model
    load_adapter(network, adapter)
    merge_layers(network)
    save_model(model.path, network)
    fused = read_gguf(written(model.path, tmp_path / "fused.gguf")).tensors
    names = {name.removesuffix(".lora_a") for name in lora.tensors if name.endswith(".lora_a")}
    assert len(names) == len(lora.tensors) / 2 == 7
    for name in names:
        a, b = lora.tensors[f"{name}.lora_a"].data, lora.tensors[f"{name}.lora_b"].data
        scale = lora.metadata["adapter.lora.alpha"] / b.shape[1]
        np.testing.assert_allclose(
            base[name].data + scale * (b @ a), fused[name].data, atol=1e-5, err_msg=name
        )
    for name in set(base) - names:
        np.testing.assert_array_equal(base[name].data, fused[name].data)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("dora", "no DoRA.*export it fused, with --to gguf"),
        ("full", "no A and B.*export it fused, with --to gguf"),
        ("soft-prompt", "part of the input.*with its base in MLX"),
    ],
)
def test_adapters_that_llama_cpp_has_no_form_for_are_refused_with_the_way(
    tmp_path: Path, method: str, reason: str
) -> None:
    model = tiny_folder(tmp_path / "model")
    adapter = adapter_of(tmp_path / "adapter", model, method)
    with pytest.raises(InputError, match=reason):
        export_gguf_lora(tmp_path / "out" / "here", model, adapter, "tiny", None, None)
    assert not list((tmp_path / "out").iterdir())


def test_a_lora_that_is_read_back_otherwise_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_folder(tmp_path / "model")
    adapter = adapter_of(tmp_path / "adapter", model)
    add = gguf.GGUFWriter.add_tensor

    def add_rounded(self: gguf.GGUFWriter, name: str, matrix: np.ndarray) -> None:
        add(self, name, matrix.round(3))

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_rounded)
    with pytest.raises(StepError, match="is not the adapter that was written"):
        export_gguf_lora(tmp_path / "out" / "here", model, adapter, "tiny", None, None)
    assert not list((tmp_path / "out").iterdir())
