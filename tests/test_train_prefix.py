"""A model without its lower layers, given their output, is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_networks import CONFIGS, tiny_network

from tasks.config import TrainSettings
from tasks.prepare.splits import TokenRows
from tasks.train.adapters import adapter_config, adapter_weights, add_adapter
from tasks.train.frozen_prefix import frozen_depth, without_frozen_layers
from tasks.train.loop import fit
from tasks.train.prefix_cache import as_mlx, length_batches, make_room, open_prefixes
from tasks.train.substitution import inject, listening, put_back, replace_prefix

KINDS = [kind for kind in CONFIGS if kind != "mamba"]
IDENTITY = {"base": "b", "data": "d"}


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hidden_states_injected_give_the_plain_logits(kind: str, depth: int) -> None:
    network = tiny_network(kind)
    inputs = mx.array(np.random.default_rng(0).integers(0, 300, (3, 24)))
    plain = network(inputs)
    with listening(network, [depth]) as heard:
        network(inputs)
    taken = replace_prefix(network, depth)
    inject(network, heard[depth])
    assert mx.array_equal(network(mx.zeros_like(inputs)), plain)
    put_back(network, taken)
    assert mx.array_equal(network(inputs), plain)


def test_a_prefix_once_replaced_refuses_to_run_without_its_output() -> None:
    network = tiny_network("llama")
    replace_prefix(network, 2)
    with pytest.raises(RuntimeError, match="without its lower layers"):
        network(mx.zeros((1, 4), mx.int32))


def test_listening_leaves_the_model_as_it_was() -> None:
    network = tiny_network("llama")
    before = list(network.layers)
    with listening(network, [1, 2]):
        pass
    assert all(a is b for a, b in zip(network.layers, before, strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_cache_holds_every_row_s_hidden_states(token_rows: TokenRows, dtype: mx.Dtype) -> None:
    network = tiny_network("llama")
    network.set_dtype(dtype)
    prefixes = open_prefixes(network, {"train": token_rows}, [1, 3], IDENTITY, 1 << 30)
    assert set(prefixes) == {1, 3}
    for depth, prefix in prefixes.items():
        for row in range(len(token_rows)):
            ids, _ = token_rows.row(row)
            with listening(network, [depth]) as heard:
                network(mx.array(ids)[None])
            span = slice(token_rows.offsets[row], token_rows.offsets[row + 1])
            cached = as_mlx(np.array(prefix.hidden["train"][span]), prefix.dtype)
            assert cached.dtype == dtype
            assert mx.allclose(cached, heard[depth][0], atol=1e-5 if dtype == mx.float32 else 5e-2)


def test_a_cache_is_built_once_and_found_again(
    token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("llama")
    first = open_prefixes(network, {"train": token_rows}, [2], IDENTITY, 1 << 30)[2]
    monkeypatch.setattr("tasks.train.prefix_cache._record", None)
    again = open_prefixes(network, {"train": token_rows}, [2], IDENTITY, 1 << 30)[2]
    assert np.array_equal(first.hidden["train"], again.hidden["train"])
    with pytest.raises(TypeError):
        open_prefixes(network, {"train": token_rows}, [2], {**IDENTITY, "base": "c"}, 1 << 30)


def test_a_half_built_cache_is_not_found(
    home: Path, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network("llama")

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.train.prefix_cache.as_numpy", dies)
        with pytest.raises(KeyboardInterrupt):
            open_prefixes(network, {"train": token_rows}, [2], IDENTITY, 1 << 30)
    assert not [path for path in (home / "cache" / "prefix").iterdir() if path.is_dir()]
    assert open_prefixes(network, {"train": token_rows}, [2], IDENTITY, 1 << 30)[2].hidden["train"].any()


def test_the_least_recently_used_cache_gives_way(home: Path, token_rows: TokenRows) -> None:
    network = tiny_network("llama")
    size = len(token_rows.tokens) * 32 * 4

    def names() -> set[str]:
        return {path.name for path in (home / "cache" / "prefix").iterdir()}

    for base in ("a", "b"):
        open_prefixes(network, {"train": token_rows}, [1], {"base": base}, 10 * size)
    [first, second] = sorted((home / "cache" / "prefix").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    open_prefixes(network, {"train": token_rows}, [1], {"base": "a"}, 10 * size)  # used again
    make_room(size, int(2.5 * size))
    assert names() == {first.name}
    assert second.name not in names()


def test_batches_by_length_hold_every_row_once_and_keep_to_their_tokens() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 200)
    batches = length_batches(lengths, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= 256 for batch in batches)


def settings_of(**changes: object) -> TrainSettings:
    given = {"num_layers": 2, "rank": 4, "learning_rate": 1e-2, "batch_size": 4, "epochs": 3}
    return TrainSettings.model_validate({**given, "steps_per_eval": 5, **changes})


def losses(kind: str, rows: TokenRows, settings: TrainSettings) -> list[float]:
    network = tiny_network(kind)
    add_adapter(network, adapter_config(settings, len(network.layers)), settings.seed)
    splits = without_frozen_layers(network, {"train": rows, "valid": rows}, settings, IDENTITY)
    training = fit(network, splits["train"], splits["valid"], settings, lambda step, metrics: None)
    return [value for _, at in training.history for name, value in at.items() if name.endswith("_loss")]


@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_training_on_a_frozen_prefix_equals_plain_training(
    kind: str, token_rows: TokenRows, home: Path
) -> None:
    plain = losses(kind, token_rows, settings_of(frozen_prefix="never"))
    assert not (home / "cache" / "prefix").exists()
    prefixed = losses(kind, token_rows, settings_of(frozen_prefix="always"))
    assert np.allclose(plain, prefixed, rtol=1e-4)
    assert any((home / "cache" / "prefix").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2},
        {"accumulation_steps": 2},
        {"grad_checkpoint": True},
        {"method": "dora"},
        {"method": "full"},
        {"num_layers": 4},
        {"num_layers": -1},
    ],
    ids=str,
)
def test_a_frozen_prefix_changes_no_other_setting(changes: dict[str, object], token_rows: TokenRows) -> None:
    plain = losses("llama", token_rows, settings_of(frozen_prefix="never", **changes))
    prefixed = losses("llama", token_rows, settings_of(frozen_prefix="always", **changes))
    assert np.allclose(plain, prefixed, rtol=1e-4)


def test_the_adapter_s_names_are_those_of_the_whole_model(token_rows: TokenRows) -> None:
    settings, network = settings_of(frozen_prefix="always"), tiny_network("qwen3")
    add_adapter(network, adapter_config(settings, 4), 0)
    names = adapter_weights(network).keys()
    without_frozen_layers(network, {"train": token_rows, "valid": token_rows}, settings, IDENTITY)
    assert adapter_weights(network).keys() == names
    assert not any("layers.0" in name or "layers.1" in name for name in dict(network.parameters()))


def test_a_cache_of_other_weights_is_noticed_and_not_used(
    token_rows: TokenRows, caplog: pytest.LogCaptureFixture
) -> None:
    settings, splits = settings_of(frozen_prefix="always"), {"train": token_rows, "valid": token_rows}
    for seed in (0, 1):  # another model, the same identity
        network = tiny_network("llama", seed=seed)
        add_adapter(network, adapter_config(settings, 4), 0)
        layers = list(network.layers)
        found = without_frozen_layers(network, splits, settings, IDENTITY)
    assert found is splits
    assert all(a is b for a, b in zip(network.layers, layers, strict=True))
    assert "log-probabilities differ" in caplog.text


@pytest.mark.parametrize("fault", ["limit", "disk"])
def test_without_room_the_layers_stay(
    fault: str, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(frozen_prefix="always", **({"prefix_cache_gb": 1e-6} if fault == "limit" else {}))
    if fault == "disk":
        usage = shutil._ntuple_diskusage(10, 10, 0)
        monkeypatch.setattr("tasks.train.frozen_prefix.shutil.disk_usage", lambda path: usage)
    network = tiny_network("llama")
    splits = {"train": token_rows, "valid": token_rows}
    assert without_frozen_layers(network, splits, settings, IDENTITY) is splits
    assert ("prefix_cache_gb" if fault == "limit" else "are free") in caplog.text


@pytest.mark.parametrize(("epochs", "used"), [(1, False), (3, True)])
def test_it_is_used_where_it_pays(token_rows: TokenRows, home: Path, epochs: int, used: bool) -> None:
    valid = token_rows.first(2)
    network, settings = tiny_network("llama"), settings_of(epochs=epochs, steps_per_eval=100)
    splits = without_frozen_layers(network, {"train": token_rows, "valid": valid}, settings, IDENTITY)
    assert (splits["train"] is not token_rows) is used


def test_what_is_trained_at_the_bottom_leaves_no_prefix() -> None:
    assert frozen_depth(settings_of(), 4) == 2
    assert frozen_depth(settings_of(num_layers=-1), 4) == 0
    assert frozen_depth(settings_of(method="soft-prompt"), 4) == 0
