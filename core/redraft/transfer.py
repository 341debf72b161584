"""Between a device and the host without making either of them wait for the other.

A plain `torch.tensor(values, device="cuda")` or `.tolist()` waits until the device has done everything it was given.
Here values go up from pinned memory, in the stream's order, and come down all at once, when somebody asks for them.
On a CPU all of this is nothing but the plain operation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers of the host as a tensor on `device`. A host that is ahead of the device does not wait."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # the allocator of pinned memory keeps it until the copy is done
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def select_rows(rows: Tensor, indices: Sequence[int]) -> Tensor:
    """These of `rows` [n, any], in ascending order; without a copy if they are all."""
    return rows if len(indices) == len(rows) else rows.index_select(0, upload(indices, torch.int64, rows.device))


def in_order(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Entries [n] of several parts, each with the places that they have in the whole; no operation for a single one."""
    filled = [part for part in parts if part[0]]
    if len(filled) == 1:
        return filled[0][1]
    places = [place for indices, _ in filled for place in indices]
    where = sorted(range(len(places)), key=places.__getitem__)
    entries = torch.cat([entries for _, entries in filled])
    return entries.index_select(0, upload(where, torch.int64, entries.device))


class Download:
    """Copies of these tensors on their way to the host; `wait` is where the host waits for the device."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies


class Stopwatch:
    """Seconds between marks, by the clock of the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from every mark to the next. Waits for the work before the last mark."""
        if not self._on_gpu:
            return [later - earlier for earlier, later in zip(self._times, self._times[1:], strict=False)]
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]
