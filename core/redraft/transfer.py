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
