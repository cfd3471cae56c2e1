"""Every attention implementation against the plain formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncsgl_engine.attention import (
    AttentionBackend,
    TorchAttention,
)
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.native import NativeAttention, build_library
from asyncsgl_engine.plan import PageCopy
from tests.engine.attention_cases import Shape, check
from tests.engine.compiled import HAS_COMPILER, compiled

CPU = torch.device("cpu")


def implementation(name: str) -> AttentionBackend:
    return TorchAttention() if name == "torch" else NativeAttention(compiled(), 2)


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
) -> None:
    backend = implementation(name)
    check(backend, Shape(heads, kv_heads, dim, page_size, window, softcap), dtype, CPU)


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


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")
def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    assert build_library(tmp_path) is not None
    denormal = torch.tensor(1e-40)
    assert float(denormal * 1.0) > 0.0, "loading it leaves floating point as it was"
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    assert build_library(tmp_path) is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [made]


def test_a_compiler_that_fails_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo no room >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert build_library(tmp_path / "native") is None
    (message,) = caplog.messages
    assert str(compiler) in message
    assert message.endswith("more slowly: no room")


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build_library(tmp_path) is None
    assert not list(tmp_path.iterdir())
