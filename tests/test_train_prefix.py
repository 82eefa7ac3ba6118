"""A model without its lower layers, given their output, is the same model."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_networks import CONFIGS, tiny_network

from tasks.prepare.splits import TokenRows
from tasks.train.prefix_cache import as_mlx, length_batches, make_room, open_prefixes
from tasks.train.substitution import listening, replace_prefix

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
    held = replace_prefix(network, depth)
    held.hidden = heard[depth]
    assert mx.array_equal(network(mx.zeros_like(inputs)), plain)


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
