"""The cache holds what the model computes, is built once, and is never found half."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_networks import tiny_network

from tasks.prepare.splits import TokenRows
from tasks.train import prefix_cache
from tasks.train.prefix_cache import PrefixCache, length_batches, only, prefixed
from tasks.train.substitution import listening

IDENTITY = {"base": "b"}
EVERY = np.arange(13)


def cache_of(network: nn.Module, base: str = "b", limit_bytes: int = 1 << 30) -> PrefixCache:
    return PrefixCache(network, {"base": base}, limit_bytes)


def folders(home: Path) -> list[Path]:
    return [path for path in (home / "cache" / "prefix").iterdir() if path.is_dir()]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rows of which a cache is built, as it happens."""
    built: list[str] = []
    build = prefix_cache._build

    def counted(hear: object, name: str, *rest: object) -> None:
        built.append(name)
        build(hear, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prefix_cache, "_build", counted)
    return built


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_bring_the_hidden_states_that_the_model_computes(token_rows: TokenRows, dtype: mx.Dtype) -> None:
    network = tiny_network("llama")
    network.set_dtype(dtype)
    opened = cache_of(network).open("train", token_rows, [1, 3])
    assert set(opened) == {1, 3}
    for depth, prefix in opened.items():
        rows = prefixed(token_rows, EVERY, prefix)
        for row in range(len(token_rows)):
            ids, _ = token_rows.row(row)
            with listening(network, [depth]) as hear:
                plain = hear(mx.array(ids)[None])[depth]
            cached = rows.padded_hidden(np.array([row]), len(ids))
            assert cached.dtype == dtype
            assert mx.allclose(cached, plain, atol=1e-5 if dtype == mx.float32 else 5e-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_batch_is_cut_and_padded_with_zeros(token_rows: TokenRows, dtype: mx.Dtype) -> None:
    network = tiny_network("llama")
    network.set_dtype(dtype)
    rows = prefixed(token_rows, EVERY, cache_of(network).open("train", token_rows, [2])[2])
    lengths = token_rows.lengths[[4, 1]].tolist()
    hidden = rows.padded_hidden(np.array([4, 1]), length := max(lengths) - 1)
    assert hidden.shape == (2, length, 32)
    for place, row in enumerate((4, 1)):
        alone = rows.padded_hidden(np.array([row]), lengths[place])[0]
        assert mx.array_equal(hidden[place, : lengths[place]], alone[:length])
        assert not hidden[place, lengths[place] :].any()


def test_rows_that_are_not_used_are_neither_computed_nor_read(token_rows: TokenRows) -> None:
    network, used = tiny_network("llama"), np.array([1, 4, 12])
    few = only(token_rows, used)
    assert [few.row(place)[0].tolist() for place in range(3)] == [
        token_rows.row(int(row))[0].tolist() for row in used
    ]
    cache = cache_of(network)
    part = prefixed(token_rows, used, cache.open("train", few, [2])[2])
    whole = prefixed(token_rows, EVERY, cache.open("train", token_rows, [2])[2])
    assert len(part.prefix.hidden) == token_rows.lengths[used].sum()
    chosen = np.array([12, 1])
    assert mx.allclose(part.padded_hidden(chosen, 20), whole.padded_hidden(chosen, 20), atol=1e-5)
    with pytest.raises(IndexError, match=r"rows \[1, 2\]"):
        part.padded_hidden(np.array([1, 2]), 20)
    with pytest.raises(IndexError):
        part.first(3).padded_hidden(np.array([2]), 20)


def test_equal_rows_share_a_cache_and_other_rows_bases_and_depths_have_their_own(
    token_rows: TokenRows, passes: list[str]
) -> None:
    network = tiny_network("llama")
    first = cache_of(network).open("train", token_rows, [2])[2]
    again = cache_of(network).open("copied", only(token_rows, EVERY), [2])[2]
    assert np.array_equal(first.hidden, again.hidden)
    assert passes == ["train"]
    cache_of(network).open("valid", token_rows.first(5), [2])
    cache_of(network, "another").open("of another base", token_rows, [2])
    cache_of(network).open("deeper", token_rows, [2, 3])
    assert passes == ["train", "valid", "of another base", "deeper"]


def test_rows_cut_in_other_places_have_their_own(token_rows: TokenRows, passes: list[str]) -> None:
    cut = token_rows.offsets.copy()
    cut[1] -= 1
    other = TokenRows(token_rows.tokens, cut, token_rows.supervised)
    cache_of(tiny_network("llama")).open("train", token_rows, [2])
    cache_of(tiny_network("llama")).open("cut", other, [2])
    assert passes == ["train", "cut"]


def test_a_depth_recorded_beside_others_equals_that_recorded_alone(token_rows: TokenRows) -> None:
    network = tiny_network("llama")
    together = cache_of(network).open("train", token_rows, [1, 2, 3])
    for depth, prefix in together.items():
        alone = cache_of(network, f"at {depth}").open("train", token_rows, [depth])[depth]
        assert np.array_equal(prefix.hidden, alone.hidden)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_of_a_build_that_fails_nothing_stays(
    fault: BaseException, home: Path, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, write = tiny_network("llama"), prefix_cache._write
    monkeypatch.setattr(prefix_cache, "BATCH_TOKENS", 64)
    left = iter(range(2))

    def full(*arguments: object) -> None:
        if next(left, None) is None:
            raise fault
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(prefix_cache, "_write", full)
        with pytest.raises(type(fault)):
            cache_of(network).open("train", token_rows, [1, 2])
    assert not folders(home)
    assert cache_of(network).open("train", token_rows, [2])[2].hidden.all()


def test_a_cache_of_another_size_is_built_anew(home: Path, token_rows: TokenRows) -> None:
    network = tiny_network("llama")
    whole = np.array(cache_of(network).open("train", token_rows, [2])[2].hidden)
    [folder] = folders(home)
    os.truncate(folder / "hidden", 1000)
    assert np.array_equal(cache_of(network).open("train", token_rows, [2])[2].hidden, whole)


def test_what_one_opens_does_not_give_way_to_what_it_opens_next(token_rows: TokenRows, home: Path) -> None:
    network = tiny_network("llama")
    size = len(token_rows.tokens) * 32 * 4
    cache = cache_of(network, limit_bytes=int(1.5 * size))
    cache.open("train", token_rows, [1])
    [first] = folders(home)
    with pytest.raises(OSError, match="prefix_cache_gb"):
        cache.open("train", token_rows, [2])
    assert folders(home) == [first]
    cache_of(network, limit_bytes=int(1.5 * size)).open("train", token_rows, [2])
    assert first not in folders(home)


def test_one_who_waited_finds_what_the_other_built(
    token_rows: TokenRows, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, building = tiny_network("llama"), prefix_cache.building
    waited = []

    def other_was_first(*arguments: object) -> object:
        if not waited:
            waited.append(True)
            cache_of(network).open("train of the other", token_rows, [2])
        return building(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prefix_cache, "building", other_was_first)
    assert cache_of(network).open("train", token_rows, [2])[2].hidden.any()
    assert passes == ["train of the other"]


CHILD = """
import os, signal, sys
import numpy as np
from tiny_networks import tiny_network
from tasks.prepare.splits import TokenRows
from tasks.train import prefix_cache

if sys.argv[1] == "dies":
    left = iter(range(3))
    write = prefix_cache._write
    def dying(*arguments):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)
    prefix_cache._write = dying
prefix_cache.BATCH_TOKENS = 64
tokens = np.random.default_rng(0).integers(3, 300, (20, 30))
rows = TokenRows.from_rows([(row.tolist(), [True] * 30) for row in tokens])
built = prefix_cache._build
def build(*arguments):
    print("built")
    built(*arguments)
prefix_cache._build = build
opened = prefix_cache.PrefixCache(tiny_network("llama"), {"base": "b"}, 1 << 30).open("train", rows, [1, 2])
assert opened[1].hidden.all() and opened[2].hidden.all()
"""


def child(home: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "TUNESMITH_CACHE": str(home / "cache"),
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], env=environment, text=True, stdout=subprocess.PIPE
    )


def test_after_a_kill_in_mid_build_the_next_builds_it_and_no_draft_stays(
    home: Path, token_rows: TokenRows
) -> None:
    assert child(home, "dies").wait() == -signal.SIGKILL
    drafts = folders(home)
    assert len(drafts) == 2
    assert all(path.name.endswith(".draft") for path in drafts)
    cache_of(tiny_network("llama")).open("train", token_rows, [1])
    assert len(folders(home)) == 1


@pytest.mark.slow
def test_of_two_processes_one_builds_and_the_other_finds_it(home: Path) -> None:
    two = [child(home, "lives") for _ in range(2)]
    told = "".join(process.communicate()[0] for process in two)
    assert [process.returncode for process in two] == [0, 0]
    assert told.count("built") == 1
    assert len(folders(home)) == 2


@pytest.mark.parametrize("tokens", [256, 4096])
def test_batches_by_length_hold_every_row_once_and_keep_to_their_tokens(tokens: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 200)
    batches = length_batches(lengths, tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= tokens for batch in batches)


def test_batches_by_length_pad_little() -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 200)
    batches = length_batches(lengths, 4096)
    assert any(lengths[batch].sum() > prefix_cache.LEAST_TOKENS for batch in batches)
    for batch in batches:
        if lengths[batch].max() * len(batch) > prefix_cache.LEAST_TOKENS:
            assert lengths[batch].max() <= 1.1 * lengths[batch].min()
