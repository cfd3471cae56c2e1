"""Arrays packed into one buffer come out as they went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncsgl_engine.transfer import pack, unpack, upload, upload_all

ARRAYS = (
    np.arange(7, dtype=np.int64)[None],
    np.zeros((0, 5), dtype=np.int32),
    np.arange(6, dtype=np.int32).reshape(2, 3).T,
    np.array([True, False, True]),
    np.linspace(0, 1, 5, dtype=np.float32),
    np.zeros(0, dtype=np.int64),
)


def test_packed_arrays_keep_type_shape_and_elements() -> None:
    buffer, places = pack(ARRAYS, pin=False)
    assert all(place.begin % 16 == 0 for place in places), "kernels load 16 bytes at once"
    for array, tensor in zip(ARRAYS, unpack(buffer.clone(), places), strict=True):
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(array)))
        assert tensor.is_contiguous()


def test_nothing_to_pack() -> None:
    buffer, places = pack((), pin=False)
    assert unpack(buffer, places) == []


def test_on_the_cpu_nothing_is_copied() -> None:
    cpu = torch.device("cpu")
    for array, tensor in zip(ARRAYS, upload_all(ARRAYS, cpu), strict=True):
        assert tensor.data_ptr() == torch.from_numpy(array).data_ptr()
    one = np.ones(3)
    assert upload(one, cpu).data_ptr() == torch.from_numpy(one).data_ptr()


@pytest.mark.gpu
def test_on_a_gpu_they_arrive() -> None:
    for array, tensor in zip(ARRAYS, upload_all(ARRAYS, torch.device("cuda")), strict=True):
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), torch.from_numpy(np.ascontiguousarray(array)))
