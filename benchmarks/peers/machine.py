"""What the machine can do at most: how fast it reads memory and multiplies matrices.

Run: python -m benchmarks.peers.machine --threads 2   (one line of JSON)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear
from torch.utils import mkldnn

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
READ_MIB = 256  # larger than a last-level cache
SHAPES = ((2048, 2048, 2048), (256, 2048, 2048), (512, 576, 1536), (64, 576, 1536), (1, 576, 1536))


def seconds(work: Callable[[], object], for_s: float = 0.4, rounds: int = 5) -> float:
    """Median time of one call."""
    work()
    begun = time.perf_counter()
    work()
    calls = max(1, int(for_s / rounds / max(time.perf_counter() - begun, 1e-6)))
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


def bandwidth(dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a sum, a copy (read and written) and a matrix-vector product."""
    size = READ_MIB * 2**20
    source = torch.ones(size // dtype.itemsize, dtype=dtype)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 4096), source[:4096].view(1, -1)
    return {
        "read": size / seconds(source.sum),
        "copy": 2 * size / seconds(lambda: target.copy_(source)),
        "gemv": size / seconds(lambda: linear(vector, matrix)),
    }


def products(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of products [m, k] x [k, n], with weights as they are and packed.

    Packed weights, as engines hold them, are the faster way in float32.
    """
    rates = {}
    for m, k, n in SHAPES:
        rows, layer = torch.randn(m, k).to(dtype), torch.nn.Linear(k, n, bias=False).eval()
        packed = mkldnn.to_mkldnn(layer, dtype)  # type: ignore[no-untyped-call]
        given = rows.to_mkldnn()
        weight = layer.weight.to(dtype)
        ways = {"plain": partial(linear, rows, weight), "packed": partial(packed, given)}
        for way, work in ways.items():
            rates[f"{m}x{k}x{n} {way}"] = 2.0 * m * k * n / seconds(work, 0.2)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    with torch.inference_mode():
        figures = {
            name: {"bytes_s": bandwidth(dtype), "flop_s": products(dtype)}
            for name, dtype in DTYPES.items()
        }
    print(json.dumps({"torch": torch.__version__, "limits": figures}))


if __name__ == "__main__":
    main()
