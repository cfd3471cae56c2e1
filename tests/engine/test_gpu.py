"""The engine on a CUDA device. `nox -s gpu` runs it; without a device nothing here runs.

It needs no fixture of the other tests, so a machine that has only PyTorch, Triton, transformers
and pytest can run it by itself:

    PYTHONPATH=.:engine python -m pytest -c /dev/null --rootdir=. --noconftest tests/engine/test_gpu.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncsgl_engine.attention import TorchAttention
from asyncsgl_engine.attention.triton_attention import TritonAttention
from asyncsgl_engine.config import EngineConfig
from asyncsgl_engine.engine import AsyncEngine
from asyncsgl_engine.errors import ConfigError
from asyncsgl_engine.graphs import CudaGraphs, Replay
from asyncsgl_engine.plan import Mask, Seat
from asyncsgl_engine.request import Request, Sampling
from asyncsgl_engine.sampler import Sampler
from tests.engine.attention_cases import LENGTHS, Shape, check
from tests.engine.conftest import save_model
from tests.engine.direct import core_for, generate, logit_errors, serve, workload

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CUDA = torch.device("cuda")
# Approximate exponentials and other orders of summation than on a CPU.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LONG = (*LENGTHS, (5000, 1), (3000, 700), (0, 1000))


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device here")


def triton_attention() -> TritonAttention:
    return TritonAttention(torch.cuda.get_device_properties(CUDA).multi_processor_count)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    "shape",
    [
        Shape(32, 8, 128, 16),
        Shape(9, 3, 64, 16),
        Shape(8, 2, 128, 64, softcap=5.0),
        Shape(8, 4, 256, 16, window=300, softcap=30.0),
        Shape(4, 4, 96, 1, window=33),
        Shape(8, 1, 80, 5),
        Shape(71, 1, 64, 16),
        Shape(10, 2, 8, 8, window=1),
    ],
)
def test_tokens_attend_to_their_own_pages(shape: Shape, dtype: torch.dtype) -> None:
    lengths = LONG if shape.window is None else LENGTHS
    check(triton_attention(), shape, dtype, CUDA, lengths, CLOSE[dtype])


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_torch_operators_on_a_gpu(dtype: torch.dtype) -> None:
    for shape in (Shape(9, 3, 64, 16), Shape(4, 2, 96, 16, 33, 2.0)):
        check(TorchAttention(), shape, dtype, CUDA, LENGTHS, CLOSE[dtype])


class Counted:
    """CUDA graphs, and how often they were replayed."""

    def __init__(self) -> None:
        self.replays = 0
        self._capture = CudaGraphs()

    def __call__(self, compute: Replay) -> Replay:
        inner = self._capture(compute)

        def replay() -> torch.Tensor:
            self.replays += 1
            return inner()

        return replay


@pytest.mark.parametrize("graphs", [0, 8])
@pytest.mark.parametrize(("kind", "page_size"), [("llama", 16), ("qwen2", 4), ("gpt2", 1)])
def test_greedy_tokens_equal_generate(
    kind: str, page_size: int, graphs: int, tmp_path: Path
) -> None:
    folder = save_model(kind, tmp_path)
    config = EngineConfig(
        model_path=str(folder),
        dtype="float32",
        device="cuda",
        page_size=page_size,
        chunked_prefill_size=64,
        max_total_tokens=2000,
        debug_check=True,
    )
    # Sometimes more rows decode than the largest graph holds.
    requests = workload(24, longest=90, output=40)
    capture = Counted() if graphs else None
    core = core_for(config, triton_attention(), graphs, capture)
    assert serve(core, requests) == generate(folder, requests, "cuda")
    if capture is not None:
        assert capture.replays > 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_bfloat16_is_as_close_as_transformers_own(kind: str, tmp_path: Path) -> None:
    ours, theirs = logit_errors(save_model(kind, tmp_path), triton_attention(), CUDA)
    assert 0.0 < ours < 1.5 * theirs


def test_tokens_are_drawn_as_on_the_cpu() -> None:
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 1},
        {"top_p": 0.7, "seed": 2},
        {"top_k": 20, "min_p": 0.05, "seed": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "temperature": 0.0},
        {"logit_bias": ((4, 50.0),), "min_new_tokens": 3, "seed": 4},
        {"temperature": 0.0},
    ]
    logits = torch.randn(len(settings), 1000, generator=torch.Generator().manual_seed(0)) * 3
    bits = np.zeros((1, 32), dtype=np.int32)
    bits[0, 3] = 1 << 5
    drawn = []
    for device in ("cpu", "cuda"):
        sampler = Sampler(len(settings), 1000, torch.device(device))
        for slot, given in enumerate(settings):
            sampling = Sampling(**given)  # type: ignore[arg-type]
            sampler.seat(
                Seat(slot, Request(f"r{slot}", (1, 2, 3), sampling), [1, 2, 3], slot, (7,))
            )
        rows, mask = range(len(settings)), Mask([len(settings) - 1], bits)
        drawn.append(sampler.draw(logits.to(device), rows, [3] * len(settings), mask).tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0][-2:] == [4, 101]


def over_processes(folder: Path, size: int) -> EngineConfig:
    return EngineConfig(
        str(folder),
        dtype="float32",
        device="cuda",
        chunked_prefill_size=64,
        max_total_tokens=2000,
        tp_size=size,
        debug_check=True,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_two_processes_with_a_device_each(kind: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("PyTorch sees one CUDA device here; this needs two")
    folder = save_model(kind, tmp_path)
    requests = workload(12, longest=90, output=30)

    async def serve_all() -> dict[str, tuple[int, ...]]:
        async with AsyncEngine(over_processes(folder, 2)) as engine:
            done = await asyncio.gather(*(engine.generate(request) for request in requests))
        return {answer.request_id: answer.token_ids for answer in done}

    assert asyncio.run(serve_all()) == generate(folder, requests, "cuda")


def test_more_processes_than_devices_are_refused(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    engine = AsyncEngine(over_processes(save_model("llama", tmp_path), count + 1))
    with pytest.raises(ConfigError, match=f"{count + 1} CUDA devices, and PyTorch sees {count}"):
        asyncio.run(engine.start())
