"""Memory for packed weights: aligned, and no two tensors in the same place, whatever their sizes."""

from __future__ import annotations

import pytest
import torch

from redraft.kernels.memory import aligned_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float16])
def test_tensors_are_aligned_and_apart(dtype: torch.dtype) -> None:
    # more than a piece in all, one larger than a piece, and one of nothing
    sizes = [1, 63, 64, 65, 5_000_000, 0, 3_000_001, 20_000_000, 7, 9_000_000]
    tensors = [aligned_empty(dtype, size) for size in sizes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.shape == (size,)
        assert size == 0 or tensor.data_ptr() % 64 == 0
        assert torch.equal(tensor, torch.full((size,), number, dtype=dtype))
