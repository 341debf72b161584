"""Memory for packed weights, in huge pages where the system has them: those of 4 kB cost some per cent of the speed."""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

_ALIGNMENT = 64  # a cache line
_HUGE_PAGE = 2 << 20
_CHUNK = 16 << 20  # layers share such pieces; what outlives the others keeps its piece

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)  # the rest of the piece begun last


def aligned_empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of any contents that starts on a cache line."""
    global _free
    size = math.prod(shape) * dtype.itemsize
    taken = -(-size // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        if taken > len(_free):
            mapped = _map_huge(max(taken, _CHUNK))
            if len(mapped) - taken < len(_free):
                return mapped[:size].view(dtype).view(shape)  # a large one; the piece begun goes on
            _free = mapped
        ours, _free = _free[:size], _free[taken:]
    return ours.view(dtype).view(shape)


def _map_huge(size: int) -> Tensor:
    """At least `size` bytes that start on a huge page's boundary."""
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + size]
