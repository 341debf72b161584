"""Where the time of a decode step goes, with everything on: gRPC streams, metrics, capture.

Shares are of the engine's thread, which is what a token waits for, while all streams decode: from everybody's first
token to anybody's last. The event loop's own CPU time runs beside it and is given apart.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.cells import Cells
from benchmarks.engine.models import DRAFT, PLAIN, Models
from benchmarks.engine.plan import Plan
from benchmarks.engine.served import Served, WatchedEngine, served
from benchmarks.engine.share_clock import Probe, ShareClock
from benchmarks.peers.workers.protocol import Request
from benchmarks.prompts import load_mixed
from redraft.speculation import verify
from redraft.speculation.step import StepUnderWay
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.writer import TrafficWriter
from redraft_server.engine import engine as engine_module
from redraft_server.engine.api import ChoiceDelta, EngineEvent
from redraft_server.engine.delivery import Delivery
from redraft_server.engine.output import CompletionOutput
from redraft_server.engine.recorder import Recorder
from redraft_server.engine.scheduler import Scheduler

FORWARDS = ("target forward", "draft forward")
SHARES = (*FORWARDS, "sampling", "scheduling", "detokenise", "gRPC", "metrics", "capture", "rest")
_RUNS = 3
_CLOSE_TIMEOUT_S = 30.0


def measure_shares(cells: Cells, models: Models, plan: Plan, data: Path | None, on_cell: Callable[[str], None]) -> None:
    """Measure every cell that is not known."""
    for mode in (PLAIN, DRAFT):
        for batch in plan.step_batches:
            identity = {"experiment": "step", "mode": mode, "batch": batch}
            if not cells.is_known(**identity):
                on_cell(f"step of {mode}, batch {batch}")
                prompts = [list(prompt.token_ids(models.tokenizer)) for prompt in load_mixed(data, batch)]
                cells.keep(identity, _measure(models, mode, prompts, plan.step_tokens))


def probes(models: Models) -> Sequence[Probe]:
    """Whose time is whose. What is left of a step when the passes are taken out is sampling and acceptance."""
    observers = [name for name in vars(ServerMetrics) if name.startswith(("observe_", "set_"))]
    return (
        Probe("target forward", models.target.runner, ("forward",)),
        Probe("draft forward", models.draft.runner, ("forward",)),
        Probe("sampling", engine_module, ("begin_step",)),
        Probe("sampling", StepUnderWay, ("finish",)),
        Probe("capture", verify, ("teacher_rows",)),
        Probe("capture", Delivery, ("_keep_for_record",)),
        Probe("capture", Recorder, ("record",)),
        Probe("scheduling", Scheduler, ("schedule", "settle", "remove")),
        Probe("detokenise", CompletionOutput, ("push",)),
        Probe("gRPC", Delivery, ("flush",)),
        Probe("metrics", engine_module, ("step_observation",)),
        Probe("metrics", ServerMetrics, observers),
    )


@dataclass
class Window:
    """Sums over the times in which all of `batch` requests decode, as the engine's thread sees them go by.

    Args:
        cpu_seconds: CPU time of the event loop's thread so far.
    """

    clock: ShareClock
    batch: int
    cpu_seconds: Callable[[], float]
    shares: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_seconds: float = 0.0
    loop_seconds: float = 0.0
    steps: int = 0
    _decoding: set[str] = field(default_factory=set)
    _opened: tuple[float, float] | None = None  # wall and CPU clock

    def on_events(self, request_id: str, events: list[EngineEvent]) -> None:
        """One request's events of one step."""
        deltas = [event for event in events if isinstance(event, ChoiceDelta)]
        if any(delta.finish_reason is not None for delta in deltas):
            self._close()
            self._decoding.clear()
        elif self._opened is None and any(delta.token_ids for delta in deltas):
            self._decoding.add(request_id)
            if len(self._decoding) == self.batch:
                self.clock.restart()
                self._opened = (time.perf_counter(), self.cpu_seconds())

    def values(self) -> dict[str, object]:
        """The row's entries: shares of the wall time of a step."""
        shares: dict[str, float] = {**self.shares, "rest": self.wall_seconds - sum(self.shares.values())}
        fractions = {name: round(shares[name] / self.wall_seconds, 4) for name in SHARES if name in shares}
        return {
            "step_ms": round(self.wall_seconds / self.steps * 1000, 3),
            "shares": fractions,
            "not_forward": round(1.0 - sum(fractions.get(name, 0.0) for name in FORWARDS), 4),
            "event_loop_cpu": round(self.loop_seconds / self.wall_seconds, 4),
            "steps": self.steps,
        }

    def _close(self) -> None:
        if self._opened is not None:
            wall, cpu = self._opened
            for name, seconds in self.clock.read().items():
                self.shares[name] += seconds
            self.steps += self.clock.calls["target forward"]
            self.wall_seconds += time.perf_counter() - wall
            self.loop_seconds += self.cpu_seconds() - cpu
            self._opened = None


def _measure(models: Models, mode: str, prompts: list[list[int]], new_tokens: int) -> dict[str, object]:
    metrics = ServerMetrics(CollectorRegistry(), "benchmark")
    clock = ShareClock()
    server: list[Served] = []  # known once it runs
    window = Window(clock, len(prompts), lambda: server[0].loop_seconds())
    request = Request(prompts, new_tokens, 0.0, 1.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        writer = TrafficWriter(folder, metrics)
        with (
            clock.watching(probes(models)),
            models.engine(mode, max_running=len(prompts), metrics=metrics, writer=writer) as engine,
            served(WatchedEngine(engine, window.on_events)) as started,
        ):
            server.append(started)
            for _ in range(_RUNS):
                started.client.generate(request)
        writer.close(_CLOSE_TIMEOUT_S)
    return window.values()
