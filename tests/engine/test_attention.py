"""Every attention implementation against the plain formula."""

from __future__ import annotations

import ctypes
import math
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from asyncsgl_engine.attention import (
    AttentionBackend,
    LayerCall,
    NativeAttention,
    StepContext,
    TorchAttention,
    build_native,
)
from asyncsgl_engine.inputs import InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.plan import PageCopy, Plan, Row

CPU = torch.device("cpu")


@cache
def library_of(folder: Path) -> ctypes.CDLL | None:
    return build_native(folder)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


def implementation(name: str, folder: Path) -> AttentionBackend:
    if name == "torch":
        return TorchAttention()
    library = library_of(folder)
    if library is None:
        pytest.skip("no C compiler here")
    return NativeAttention(library)


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> torch.Tensor:
    """One token's query (heads, dim) over its whole context (n, kv_heads, dim), in float64."""
    group = query.shape[0] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", query.double(), keys) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.window is not None:
        scores[:, : max(keys.shape[0] - call.window, 0)] = -math.inf
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 40), (8, 2, 128)]
)
@pytest.mark.parametrize(
    ("page_size", "window", "softcap"),
    [(16, None, None), (1, None, None), (8, 20, None), (64, None, 5.0), (16, 33, 2.0)],
)
def test_tokens_attend_to_their_own_pages(
    name: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    window: int | None,
    softcap: float | None,
    build_folder: Path,
) -> None:
    draw = random.Random(1)
    torch.manual_seed(1)
    lengths = [(0, 1), (36, 1), (100, 1), (15, 1), (0, 40), (50, 30), (31, 2)]
    pages = list(range(400))
    draw.shuffle(pages)
    rows = []
    for slot, (start, count) in enumerate(lengths):
        own = [pages.pop() for _ in range(-(-(start + count) // page_size))]
        rows.append(Row(slot, [1] * count, start, own, 0, count, (), sample=True))
    backend = implementation(name, build_folder)
    cache = KVCache(2, 400, page_size, kv_heads, dim, dtype, CPU)
    cache.keys[1].normal_()
    cache.values[1].normal_()
    batch = InputBuilder(8, page_size, 200, backend.needs_slots, CPU).build(Plan(tuple(rows)))
    total = sum(count for _, count in lengths)
    # As transformers gives them: views of (1, T, heads, dim), some of one wide projection.
    wide = torch.randn(total, heads + 2 * kv_heads, dim).to(dtype)
    query, key, value = torch.split(wide, [heads, kv_heads, kv_heads], dim=1)
    call = LayerCall(query, key, value, 1, dim**-0.5, window, softcap)
    out = backend.attend(call, StepContext(batch, cache, backend))
    begin = 0
    for row, (start, count) in zip(rows, lengths, strict=True):
        for offset in range(count):
            slots = [
                row.pages[position // page_size] * page_size + position % page_size
                for position in range(start + offset + 1)
            ]
            keys, values = cache.keys[1][slots], cache.values[1][slots]
            assert torch.equal(keys[-1], call.key[begin])
            expected = reference(call.query[begin], keys, values, call)
            close = 2e-2 if dtype is torch.bfloat16 else 2e-6
            torch.testing.assert_close(out[begin].double(), expected, atol=close, rtol=close)
            begin += 1


def test_copies_take_the_beginning_of_a_page_in_every_layer() -> None:
    cache = KVCache(3, 4, 4, 2, 8, torch.float32, CPU)
    for layer in range(3):
        cache.keys[layer].normal_()
        cache.values[layer].normal_()
    before = [part.clone() for part in (*cache.keys, *cache.values)]
    cache.copy([PageCopy(1, 3, 3), PageCopy(3, 0, 2)])
    for old, new in zip(before, (*cache.keys, *cache.values), strict=True):
        assert torch.equal(new[12:15], old[4:7])
        assert torch.equal(new[15], old[15])
        assert torch.equal(new[:2], old[4:6])
        assert torch.equal(new[2:12], old[2:12])


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    assert build_native(tmp_path) is not None
    denormal = torch.tensor(1e-40)
    assert float(denormal * 1.0) > 0.0, "loading it leaves floating point as it was"
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    assert build_native(tmp_path) is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [made]


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build_native(tmp_path) is None
    assert not list(tmp_path.iterdir())
