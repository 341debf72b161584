"""What the numbers were measured on, how fast its memory is, and who else was using it."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path

import torch

_BUFFER_BYTES = 512 * 2**20  # far beyond any cache
_READS = 7
QUIET_CORES = 0.12  # use by other processes that a measurement may ignore
_STAT = Path("/proc/stat")


def wait_passively() -> None:
    """Start the program again with passive OpenMP waiting, as `redraft-server` has it, unless the caller chose.

    OpenMP reads the setting once, when torch is loaded. Spinning threads of one engine would slow the next one down.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, sys.orig_argv)


def processor() -> str:
    """Model, instruction set and number of cores: what a row of results was measured on."""
    return f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()}), {len(os.sched_getaffinity(0))} cores"


def machine_line() -> str:
    """Processor, cores and library versions in one line; nothing that names the machine."""
    parts = [
        processor(),
        f"{torch.get_num_threads()} threads",
        *(f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY",) if name in os.environ),
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("torch", "transformers", "redraft")),
    ]
    return ", ".join(parts)


def read_bandwidth_gb_s() -> float:
    """GB/s at which torch's threads read memory, best of a few sums over a large buffer."""
    buffer = torch.ones(_BUFFER_BYTES // 4)
    seconds = []
    for _ in range(_READS):
        started = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - started)
    return _BUFFER_BYTES / min(seconds) / 1e9


class OtherLoad:
    """Cores that other processes kept busy between `start` and `stop`; a measurement beside a busy core is noise.

    `sessions` gives the process sessions that belong to the measurement, beside this process.
    """

    def __init__(self, sessions: Callable[[], Collection[int]] = tuple) -> None:
        self.samples: list[float] = []
        self._sessions = sessions
        self._before = (0.0, 0.0, 0.0)

    def start(self) -> None:
        self._before = self._now()

    def stop(self) -> None:
        wall, busy, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        self.samples.append(max(0.0, busy - own) / max(wall, 1e-3))

    @property
    def median(self) -> float | None:
        """Cores, median of the samples; None without any."""
        return statistics.median(self.samples) if self.samples and _STAT.exists() else None

    @property
    def is_noisy(self) -> bool:
        return self.median is not None and self.median > QUIET_CORES

    def describe(self) -> str:
        """A phrase for the report."""
        if not self.samples or not _STAT.exists():
            return "load of other processes unknown"
        return f"other processes used {statistics.median(self.samples):.2f} cores (most: {max(self.samples):.2f})"

    def _now(self) -> tuple[float, float, float]:
        times = os.times()
        busy = 0.0
        if _STAT.exists():
            user, nice, system, _, _, irq, soft_irq, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
            busy = (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, times.user + times.system + _session_seconds(self._sessions())


def _session_seconds(sessions: Collection[int]) -> float:
    """CPU seconds of all processes in these sessions, of their ended children too."""
    ticks = 0
    for stat in _STAT.parent.glob("[0-9]*/stat") if sessions else ():
        with contextlib.suppress(OSError):  # it may end while we look
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
