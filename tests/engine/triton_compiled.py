"""Run by `test_triton.py` in a process of its own: the kernels, compiled for GPUs that are not here.

What is compiled is what `TritonAttention` launches, caught in place of the launch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from asyncsgl_engine import triton_layers
from asyncsgl_engine.attention import LayerCall, StepContext, triton_kernels
from asyncsgl_engine.attention.triton_attention import TritonAttention
from asyncsgl_engine.inputs import InputBuilder
from asyncsgl_engine.kv_cache import KVCache
from asyncsgl_engine.plan import Plan, Row

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = 99 << 10  # bytes; the least that a program may take on GPUs since Ampere


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    named: dict[str, Any]


def launches(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None
) -> list[Launch]:
    """What one layer launches for a step of decoding and prefill."""
    caught: list[Launch] = []

    def catching(name: str) -> Any:
        kernel = getattr(triton_kernels, name)

        class Catch:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                assert all(size > 0 for size in grid)
                return lambda *args, **named: caught.append(Launch(kernel, args, named))

        return Catch()

    backend = TritonAttention(132)
    names = ("write", "decode", "join", "prefill")
    backend._kernels = SimpleNamespace(**{name: catching(name) for name in names})
    cpu = torch.device("cpu")
    rows = [(9000, 1), (512, 64)]
    pages = iter(range(2000))
    plan = [
        Row(
            slot,
            [1] * new,
            start,
            [next(pages) for _ in range(-(-(start + new) // 16))],
            0,
            1,
            (),
            True,
        )
        for slot, (start, new) in enumerate(rows)
    ]
    batch = InputBuilder(2, 16, 600, False, cpu, True).build(Plan(tuple(plan)))
    cache = KVCache(1, 700, 16, kv_heads, dim, dtype, cpu)
    query = torch.empty(65, heads, dim, dtype=dtype)
    key, value = torch.empty(2, 65, kv_heads, dim, dtype=dtype).unbind(0)
    call = LayerCall(query, key, value, 0, dim**-0.5, window, 30.0 if window else None)
    backend.attend(call, StepContext(batch, cache, backend))
    return caught


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel as its launch would specialise it."""
    kernel, options = launch.kernel, dict(launch.named)
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature = dict.fromkeys(constants, "constexpr")
    attributes = {}
    given = [param for param in kernel.params if param.name not in constants]
    for param, value in zip(given, launch.args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            divides = True
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            whole = isinstance(value, int) and value % 16 == 0
            divides = whole and not param.do_not_specialize
        if divides:
            attributes[param.num,] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(binary: bytes, folder: Path) -> int:
    """Local memory of a thread: registers that were spilled."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    told = subprocess.run(
        [_CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    (size,) = re.findall(r"STACK:(\d+)", told)
    return int(size)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim", "window", "capability"),
    [
        (torch.bfloat16, 32, 8, 128, None, 80),
        (torch.bfloat16, 32, 8, 128, None, 90),
        (torch.bfloat16, 9, 3, 64, None, 90),
        (torch.bfloat16, 32, 8, 128, None, 100),
        (torch.bfloat16, 8, 4, 256, None, 120),
        (torch.float16, 8, 4, 256, 4096, 90),
        (torch.float32, 4, 2, 80, 100, 90),
    ],
)
def test_every_kernel_compiles(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    capability: int,
    tmp_path: Path,
) -> None:
    made = launches(dtype, heads, kv_heads, dim, window)
    names = [launch.kernel.__name__ for launch in made]
    assert names == ["write", "decode", "join", "prefill"]
    for launch in made:
        binary = compiled(launch, capability)
        assert binary.metadata.shared <= SHARED
        if capability == 90:
            assert stack_bytes(binary.asm["cubin"], tmp_path) <= 16, "registers were spilled"
        if dtype is not torch.float32:
            check_instructions(launch.kernel.__name__, binary.asm["ptx"], capability)


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("norms", [False, True])
def test_what_lies_between_the_products_compiles(norms: bool, tmp_path: Path) -> None:
    turns, positions = of(100, 2, 64, dtype=torch.float32), of(4, dtype=torch.int64)
    rotated = (of(4, 6144), positions, turns, of(128), of(128), 1e-5, 6144)
    heads = {"HEADS": 32, "DIM": 128, "HALF_PAD": 64, "HAS_NORMS": norms, "num_warps": 1}
    width = {"WIDTH": 4096, "WIDTH_PAD": 4096, "HAS_DELTA": norms, "num_warps": 8}
    normalised = (of(4, 4096), of(4, 4096), of(4096), of(4, 4096), 1e-5)
    for launch in (
        Launch(triton_layers.add_norm, normalised, width),
        Launch(triton_layers.rotate, rotated, heads),
        Launch(triton_layers.gate, (of(4, 512), of(4, 256)), {"WIDTH": 256, "BLOCK": 1024}),
    ):
        binary = compiled(launch, 90)
        assert stack_bytes(binary.asm["cubin"], tmp_path) == 0
        if launch.kernel is not triton_layers.rotate:
            assert "ld.global.v4" in binary.asm["ptx"]


def check_instructions(name: str, code: str, capability: int) -> None:
    if name in ("decode", "prefill"):
        copied = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*\], \[.*\], 0x(\w+)", code)
        assert set(copied) == {"10"}, "keys and values come 16 bytes at once, ahead of their use"
        assert "mma" in code, "on matrix units"
    if name == "prefill" and capability == 90:
        assert "wgmma" in code, "on Hopper's"
    if name == "write":
        assert "st.global.v" in code
