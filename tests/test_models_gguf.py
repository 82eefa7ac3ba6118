"""GGUF files become the models and tokenizers they were made from, or are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tasks.errors import InputError
from tasks.home import cache_dir
from tasks.models import gguf_import
from tasks.models.gguf_check import check_gguf, read_gguf
from tasks.models.gguf_config import llama3_factors, model_config
from tasks.models.gguf_import import gguf_folder_config, import_gguf
from tasks.models.gguf_tokenizer import SPLITS, build_tokenizer
from tasks.models.gguf_weights import affine_from_blocks
from tasks.models.load import load_model
from tasks.models.mlx_lm_import import import_mlx_lm
from tasks.models.safety import read_config

import_mlx_lm()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402
from mlx_lm.utils import load_model as mlx_lm_load_model  # noqa: E402

VOCABULARY = 288
IDS = mx.array([[1, 5, 250, 33, 7, 7, 100, 3]])
Q8_0, Q4_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1"))
Q5_1, BF16, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q5_1", "BF16", "F16", "F32"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def tiny_config(model_type: str, tied: bool) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if model_type == "qwen3" else 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "tie_word_embeddings": tied,
    }


def tiny_tokens() -> tuple[list[str], list[str], list[int]]:
    """256 bytes, three merges, one user-defined token and two control tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "he", "ll", "hell", "[note]", "<|start|>", "<|end|>"]
    return tokens, ["h e", "l l", "he ll"], [1] * 259 + [4, 3, 3]


def write_tiny_gguf(
    path: Path,
    model_type: str = "llama",
    tied: bool = True,
    kind: gguf.GGMLQuantizationType = F32,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    leave_out: str | None = None,
    spoil: bool = False,
) -> Any:
    """Write a random model as llama.cpp's converter does, and return mlx_lm's model of the same weights.

    Names are those of gguf's own table; q and k rows of Llama are permuted as its converter does.
    """
    config = tiny_config(model_type, tied)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    writer = gguf.GGUFWriter(path, model_type)
    write_metadata(writer, config)
    if change:
        change(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, model_type.upper()), 2)
    draw = np.random.default_rng(0)
    weights = {}
    for name, shape in sorted((name, value.shape) for name, value in tree_flatten(model.parameters())):
        values = (draw.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        stored = kind if len(shape) == 2 else F32
        weights[name] = gguf.dequantize(gguf.quants.quantize(values, stored), stored)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0) if model_type == "llama" else 0
        if heads:
            values = values.reshape(heads, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target != leave_out:
            if spoil:
                values[0] = np.inf
            writer.add_tensor(target, gguf.quants.quantize(values, stored), raw_dtype=stored)
    finish(writer)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in weights.items()]))
    return model


def write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    tokens, merges, kinds = tiny_tokens()
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokens.index("<|start|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def overwrite(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    """A change of one metadata value, added or replaced."""

    def change(writer: gguf.GGUFWriter) -> None:
        data = writer.kv_data[0]
        data.pop(key, None)
        adders = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            adders.get(type(value), writer.add_uint32)(key, value)

    return change


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", [F32, Q8_0], ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_imported_model_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, model_type: str, kind: gguf.GGMLQuantizationType, tied: bool
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", model_type, tied, kind)
    loaded = load_model(import_gguf(tmp_path / "tiny.gguf", "tiny"))
    assert loaded.config["tie_word_embeddings"] is tied
    np.testing.assert_allclose(np.array(loaded.model(IDS)), np.array(model(IDS)), atol=1e-4)


@pytest.mark.parametrize("kind", [F16, BF16, Q4_0, Q4_1, Q5_1], ids=lambda kind: str(kind.name))
def test_every_kind_of_tensor_is_dequantised_as_the_gguf_package_does(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    loaded = load_model(import_gguf(tmp_path / "tiny.gguf", "tiny"))
    expected = dict(tree_flatten(model.parameters()))
    for name, value in tree_flatten(loaded.model.parameters()):
        assert mx.array_equal(value, expected[name]), name


@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0], ids=lambda kind: str(kind.name))
def test_stored_precision_keeps_quantised_blocks_without_loss(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", tied=False, kind=kind)
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny", "stored")
    quantised, config = mlx_lm_load_model(folder)
    bits = 8 if kind == Q8_0 else 4
    assert config["quantization"] == {"group_size": 32, "mode": "affine", "bits": bits}
    assert quantised.model.layers[0].self_attn.q_proj.scales.dtype == mx.float16
    plain = load_model(folder).model  # dequantised on CPU
    expected = dict(tree_flatten(model.parameters()))
    for name, value in tree_flatten(plain.parameters()):
        tolerance = 0 if value.ndim == 2 else 1e-3  # norms are float16 beside float16 scales
        np.testing.assert_allclose(np.array(value), np.array(expected[name]), atol=tolerance, err_msg=name)


def test_layers_that_differ_in_bits_have_their_own_entry(tmp_path: Path) -> None:
    def mix(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", gguf.quants.quantize(rows, Q8_0), raw_dtype=Q8_0)

    rows = np.random.default_rng(1).standard_normal((VOCABULARY, 64)).astype(np.float32)
    write_tiny_gguf(tmp_path / "tiny.gguf", tied=True, kind=Q4_1, change=mix)
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny", "stored")
    quantised, config = mlx_lm_load_model(folder)
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["lm_head"] == {"group_size": 32, "mode": "affine", "bits": 8}
    assert quantised.lm_head.bits == 8
    assert quantised(IDS).shape == (1, IDS.size, VOCABULARY)


@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0], ids=lambda kind: str(kind.name))
def test_repacked_blocks_are_those_of_mlx_own_reader(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    theirs = mx.load(str(tmp_path / "tiny.gguf"))
    tensors = read_gguf(tmp_path / "tiny.gguf").tensors
    for layer in ("blk.0.ffn_down", "blk.1.attn_v", "token_embd"):
        ours = affine_from_blocks(tensors[f"{layer}.weight"].data, kind.name)
        for part, value in zip(("weight", "scales", "biases"), ours, strict=True):
            np.testing.assert_array_equal(value, np.array(theirs[f"{layer}.{part}"]), err_msg=layer)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "SHARD_ELEMENTS", 20_000)
    model = write_tiny_gguf(tmp_path / "tiny.gguf", tied=False)
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    np.testing.assert_allclose(np.array(load_model(folder).model(IDS)), np.array(model(IDS)), atol=1e-4)


def test_llama3_frequency_factors_become_its_rope_scaling(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        factors = np.array(llama3_factors(16, 5000.0, 32.0), dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)

    write_tiny_gguf(tmp_path / "tiny.gguf", change=change)
    config = model_config(read_gguf(tmp_path / "tiny.gguf"))
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 32
    rope = load_model(import_gguf(tmp_path / "tiny.gguf", "tiny")).model.model.layers[0].self_attn.rope
    plain = 5000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(np.array(rope._freqs) / plain, llama3_factors(16, 5000.0, 32.0), rtol=1e-5)


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 7, 8, dtype=np.float32))

    write_tiny_gguf(tmp_path / "tiny.gguf", change=change)
    with pytest.raises(InputError, match="Llama 3's rule"):
        import_gguf(tmp_path / "tiny.gguf", "tiny")


def test_linear_and_yarn_rope_scaling_are_carried_over(tmp_path: Path) -> None:
    def change(kind: str) -> Callable[[gguf.GGUFWriter], None]:
        def both(writer: gguf.GGUFWriter) -> None:
            writer.add_string("llama.rope.scaling.type", kind)
            writer.add_float32("llama.rope.scaling.factor", 4.0)
            writer.add_uint32("llama.rope.scaling.original_context_length", 32)

        return both

    for kind in ("linear", "yarn"):
        write_tiny_gguf(tmp_path / f"{kind}.gguf", change=change(kind))
        scaling = model_config(read_gguf(tmp_path / f"{kind}.gguf"))["rope_scaling"]
        assert (scaling["rope_type"], scaling["factor"]) == (kind, 4.0)
        load_model(import_gguf(tmp_path / f"{kind}.gguf", kind)).model(IDS)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", "mamba", "supported are llama, qwen2, qwen3"),
        ("tokenizer.ggml.model", "llama", "supported is 'gpt2'"),
        ("tokenizer.ggml.pre", "chatglm-bpe", "not a known splitting rule"),
        ("tokenizer.ggml.merges", ["he"], "not a pair of tokens"),
        ("tokenizer.ggml.merges", ["he zz"], "do not fit together"),
        ("tokenizer.ggml.eos_token_id", 9999, "9999 of 262 tokens"),
        ("llama.expert_count", 8, "expert_count = 8"),
        ("llama.attention.sliding_window", 64, "sliding_window = 64"),
        ("llama.rope.scaling.type", "longrope", "'longrope' cannot be imported"),
        ("llama.rope.dimension_count", 8, "rotates 8 of 16"),
        ("llama.attention.value_length", 8, "keys of 16 and values of 8"),
        ("llama.attention.head_count", [4, 4], "expected one int"),
        ("llama.feed_forward_length", 128, r"\(96, 64\), expected \(128, 64\)"),
        ("llama.block_count", 3, "tensors of 2 blocks"),
        ("llama.embedding_length", 1 << 31, "expected 1 to 16,777,216"),
        ("llama.attention.layer_norm_rms_epsilon", "small", "expected one float"),
    ],
)
def test_what_cannot_be_represented_is_refused_with_its_reason(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", change=overwrite(key, value))
    with pytest.raises(InputError, match=reason):
        import_gguf(tmp_path / "tiny.gguf", "tiny")
    assert not list(cache_dir().glob("models/*"))


def test_a_missing_a_strange_and_an_infinite_tensor_are_refused(tmp_path: Path) -> None:
    def strange(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 32), dtype=np.float32))

    write_tiny_gguf(tmp_path / "missing.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"up_proj\.weight is missing"):
        import_gguf(tmp_path / "missing.gguf", "tiny")
    write_tiny_gguf(tmp_path / "strange.gguf", change=strange)
    with pytest.raises(InputError, match="ffn_gate_exps"):
        import_gguf(tmp_path / "strange.gguf", "tiny")
    write_tiny_gguf(tmp_path / "infinite.gguf", spoil=True)
    with pytest.raises(InputError, match="infinities"):
        import_gguf(tmp_path / "infinite.gguf", "tiny")
    assert not list(cache_dir().glob("models/*"))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "tiny.gguf"
    write_tiny_gguf(whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 8, 23, *range(24, len(data), len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match="GGUF"):
            check_gguf(cut)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    # After the name: dimensions (4 bytes), two sizes (8 each) and the type (4).
    place = data.index(name) + len(name) + 4 + 16 + 4
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"overlaps|does not fit"):
        check_gguf(path)


def test_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    whole = tmp_path / "tiny.gguf"
    write_tiny_gguf(whole)
    data = bytearray(whole.read_bytes())
    header_bytes = read_gguf(whole).tensors["token_embd.weight"].data_offset
    draw = random.Random(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(150):
        copy = bytearray(data)
        for _ in range(3):
            copy[draw.randrange(min(header_bytes, len(copy)))] = draw.randrange(256)
        damaged.write_bytes(copy)
        try:
            model_config(read_gguf(damaged))
        except InputError:
            refused += 1
    assert refused > 20


def test_a_count_beyond_the_file_is_refused_at_once(tmp_path: Path) -> None:
    whole = tmp_path / "tiny.gguf"
    write_tiny_gguf(whole)
    data = bytearray(whole.read_bytes())
    start = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    data[start : start + 8] = (1 << 60).to_bytes(8, "little")
    whole.write_bytes(data)
    with pytest.raises(InputError, match=r"token_type' of .* bytes where"):
        read_gguf(whole)


def test_a_failed_import_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        import_gguf(tmp_path / "tiny.gguf", "tiny")
    assert list((cache_dir() / "models").iterdir()) == []


def test_a_second_import_reuses_the_first_and_a_changed_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    first = import_gguf(path, "tiny")
    with monkeypatch.context() as held:
        held.setattr(gguf_import, "read_gguf", lambda _: pytest.fail("read again"))
        assert import_gguf(path, "tiny") == first
    write_tiny_gguf(path, tied=False)
    assert import_gguf(path, "tiny") not in (first, import_gguf(path, "tiny", "stored"))


def test_the_config_of_a_file_is_read_once_and_is_that_of_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    config = gguf_folder_config(path, "tiny")
    with monkeypatch.context() as held:
        held.setattr(gguf_import, "read_gguf", lambda _: pytest.fail("read again"))
        assert gguf_folder_config(path, "tiny") == config
    assert read_config(import_gguf(path, "tiny")) == config


def test_the_tokenizer_loads_in_transformers_and_decodes_what_it_encodes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "hello [note] 12\n\twörld  😀<|end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id == 261
    assert {"hell", "[note]"} <= set(tokenizer.convert_ids_to_tokens(ids))
    # Control tokens are left out of text for people, user-defined ones are text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|end|>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|start|>hi<|end|>"
    assert load_model(folder).tokenizer.eos_token_ids == {261}


def test_bos_is_added_when_the_file_says_so_and_for_llama3_unless_it_says_not(tmp_path: Path) -> None:
    def first_id(*changes: tuple[str, Any]) -> int:
        def change(writer: gguf.GGUFWriter) -> None:
            for key, value in changes:
                overwrite(key, value)(writer)

        write_tiny_gguf(tmp_path / "tiny.gguf", change=change)
        return int(build_tokenizer(read_gguf(tmp_path / "tiny.gguf")).encode("x").ids[0])

    pre, add = ("tokenizer.ggml.pre", "llama-bpe"), "tokenizer.ggml.add_bos_token"
    assert first_id() != 260
    assert first_id((add, True)) == 260
    assert first_id(pre) == 260
    assert first_id(pre, (add, False)) != 260


@pytest.mark.parametrize(("rule", "count"), [("llama-bpe", 1), ("qwen2", 3)])
def test_llama3_takes_a_whole_piece_before_it_merges(tmp_path: Path, rule: str, count: int) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        tokens, _, kinds = tiny_tokens()
        overwrite("tokenizer.ggml.tokens", [*tokens, "wow"])(writer)
        overwrite("tokenizer.ggml.token_type", [*kinds, 1])(writer)
        overwrite("tokenizer.ggml.pre", rule)(writer)

    write_tiny_gguf(tmp_path / "tiny.gguf", change=change)
    tokenizer = build_tokenizer(read_gguf(tmp_path / "tiny.gguf"))
    assert len(tokenizer.encode("wow", add_special_tokens=False).ids) == count


def test_bos_stands_once_before_text_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf", change=overwrite("tokenizer.ggml.add_bos_token", True))
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "tiny.gguf", "tiny"))
    assert tokenizer.encode("hell")[0] == 260
    assert len(tokenizer.encode("hell")) == 2
    assert tokenizer.decode(tokenizer.encode("hell"), skip_special_tokens=True) == "hell"
    chat = [{"role": "user", "content": "hell"}]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == [260, 258, 261]


def test_every_end_of_turn_is_in_the_generation_config(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", change=overwrite("tokenizer.ggml.eot_token_id", 260))
    folder = import_gguf(tmp_path / "tiny.gguf", "tiny")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [261, 260]
    assert load_model(folder).tokenizer.eos_token_ids == {260, 261}


def test_each_splitting_rule_splits_digits_its_own_way(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    pieces = {}
    for rule in SPLITS:
        write_tiny_gguf(tmp_path / "tiny.gguf", change=overwrite("tokenizer.ggml.pre", rule))
        tokenizer = build_tokenizer(read_gguf(tmp_path / "tiny.gguf"))
        pieces[rule] = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 12345")]
    assert pieces == {
        "default": ["a", "Ġ", "123", "45"],
        "gpt-2": ["a", "Ġ12345"],
        "smollm": ["a", "Ġ", "1", "2", "3", "4", "5"],
        "llama-bpe": ["a", "Ġ", "123", "45"],
        "qwen2": ["a", "Ġ", "1", "2", "3", "4", "5"],
    }
