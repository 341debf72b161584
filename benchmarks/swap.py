"""What a swap of drafts costs the streams that are running: the time between a stream's chunks, stage by stage.

    python -m benchmarks.swap

A server's engine with a draft registry, a few streams that never pause, and a second version of the draft that is
published meanwhile: it is loaded aside, shadow-scored, tried by a canary and promoted. Every chunk of a stream is a
step of the engine, so a step that a swap delays shows as a longer gap. A step that also computes somebody's prompt is
longer without any swap, so gaps with a prompt in them are told apart.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry
from rich.console import Console

from benchmarks.machine import OtherLoad, machine_line, wait_passively
from benchmarks.prompts import DataOption, load_prompts
from benchmarks.report import RESULTS, table, write_page
from redraft.models.demo_draft import demo_draft_directory
from redraft.models.loader import weights_fingerprint
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft.models.tokenizer import load_tokenizer
from redraft.registry.contents import describe_directory
from redraft.registry.manifest import DraftManifest
from redraft.registry.store import DraftRegistry
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import ServerConfig
from redraft_server.engine.api import ChoiceDelta, EngineEvent, EngineRequest, RequestFinished
from redraft_server.engine.build import build_engine
from redraft_server.engine.engine import Engine
from redraft_server.garbage import settle
from redraft_server.rollout.start import DraftSupply

_STOP_S = 30.0
_MAX_WAIT_S = 600.0
console = Console()


@dataclass
class Stream:
    """Submits one request after the other; notes each chunk behind a request's first, as from when to when one waited
    for it, and from when to when each prompt was computed."""

    engine: Engine
    prompts: Iterator[Sequence[int]]
    new_tokens: int
    stopping: threading.Event
    gaps: list[tuple[float, float]] = field(default_factory=list)
    prompts_computed: list[tuple[float, float]] = field(default_factory=list)
    _last: float | None = None
    _submitted: float = 0.0
    _count: int = 0

    def submit(self) -> None:
        self._count += 1
        self._last, self._submitted = None, time.monotonic()
        request = EngineRequest(
            request_id=f"{id(self)}-{self._count}",
            prompt_token_ids=tuple(next(self.prompts)),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_new_tokens=self.new_tokens, ignore_eos=True),
        )
        self.engine.submit(request, self._on_events)

    def _on_events(self, events: list[EngineEvent]) -> None:
        now = time.monotonic()
        if any(isinstance(event, ChoiceDelta) for event in events):
            if self._last is None:
                self.prompts_computed.append((self._submitted, now))
            else:
                self.gaps.append((self._last, now))
            self._last = now
        if any(isinstance(event, RequestFinished) for event in events) and not self.stopping.is_set():
            threading.Thread(target=self.submit, daemon=True).start()  # not from the engine's own thread


def main(
    streams: Annotated[int, typer.Option(min=1, max=32, help="Streams that run throughout.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a request.")] = 192,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of the quiet phases before and after.")] = 15.0,
    shadow_positions: Annotated[int, typer.Option(min=1, help="As rollout.shadow_positions.")] = 200,
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = RESULTS / "swap.md",
) -> None:
    """Swap a draft under traffic; write a Markdown page."""
    wait_passively()
    tokenizer = load_tokenizer(ModelRef.parse("demo"))
    prompts = itertools.cycle([p.token_ids(tokenizer) for p in load_prompts(data, 8).prompts])
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        registry, manifest = DraftRegistry(folder), _manifest()
        registry.publish(demo_draft_directory()[0], manifest)
        config = _config(folder, streams, new_tokens, shadow_positions)
        longest = config.speculation.num_speculative_tokens
        metrics = ServerMetrics(CollectorRegistry(), "demo", max_draft_tokens=longest)
        supply = DraftSupply(config, metrics)
        built = build_engine(config, metrics, first_draft=supply.first, monitor=supply.monitor)
        rollout = supply.rollout(built.engine, built.host, built.draft)
        settle()  # as the server does
        rollout.start()
        stopping = threading.Event()
        running = [Stream(built.engine, prompts, new_tokens, stopping) for _ in range(streams)]
        load.start()
        marks: list[tuple[str, float]] = []

        def begin(stage: str, until: Callable[[], bool]) -> None:
            console.print(stage)
            marks.append((stage, time.monotonic()))
            _wait(until)

        for stream in running:
            stream.submit()
        _wait(_after(3.0))
        begin("before", _after(seconds))
        marks.append(("publish (here, elsewhere in earnest)", time.monotonic()))
        registry.publish(demo_draft_directory()[0], manifest.model_copy(update={"version": "v2"}))
        begin("load", lambda: rollout.state != "idle")
        begin("shadow", lambda: rollout.state != "shadow")
        begin("canary", lambda: rollout.state == "idle")
        begin("after", _after(seconds))
        marks.append(("", time.monotonic()))
        load.stop()
        stopping.set()
        active = built.engine.info.draft_version
        rollout.stop(_STOP_S)
        built.engine.stop(_STOP_S)
    _report(output, running, marks, active, load)


def _manifest() -> DraftManifest:
    """Of the draft that comes with the package, as version v1."""
    target = resolve_source(ModelRef.parse("demo"), cache_dir=None).directory
    return DraftManifest(
        version="v1",
        created_unix_s=time.time(),
        files=describe_directory(demo_draft_directory()[0]),
        target_name="demo",
        target_fingerprint=weights_fingerprint(target),
        tokenizer_fingerprint=load_tokenizer(ModelRef.parse("demo")).fingerprint,
        num_parameters=1,
    )


def _config(folder: str, streams: int, new_tokens: int, shadow_positions: int) -> ServerConfig:
    return ServerConfig.model_validate(
        {
            "model": {"target": "demo"},
            "engine": {"max_running_requests": streams, "kv_cache_tokens": streams * (new_tokens + 512)},
            "speculation": {"num_speculative_tokens": 4, "adaptive": False},
            "registry": {"url": folder, "poll_s": 1.0},
            "rollout": {"shadow_positions": shadow_positions, "canary_share": 0.5, "canary_max_s": 30.0, "margin": 0.3},
        }
    )


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _wait(until: Callable[[], bool]) -> None:
    give_up = time.monotonic() + _MAX_WAIT_S
    while not until():
        if time.monotonic() > give_up:
            raise RuntimeError("the swap did not get on: see the log")
        time.sleep(0.02)


def _report(
    output: Path, streams: Sequence[Stream], marks: Sequence[tuple[str, float]], active: str, load: OtherLoad
) -> None:
    prompts = [span for stream in streams for span in stream.prompts_computed]
    rows: list[list[str]] = []
    for (stage, start), (_, end) in itertools.pairwise(marks):
        spans = [span for stream in streams for span in stream.gaps if start <= span[1] < end]
        alone = [t1 - t0 for t0, t1 in spans if not any(p0 < t1 and t0 < p1 for p0, p1 in prompts)]
        gaps = sorted(t1 - t0 for t0, t1 in spans)
        if not alone:
            rows.append([stage, f"{end - start:.1f}", str(len(gaps)), *[""] * 5])
            continue
        p99 = gaps[int(0.99 * (len(gaps) - 1))]
        median, longest = statistics.median(alone), max(alone)
        figures = [f"{1000 * value:.0f}" for value in (median, p99, gaps[-1], longest)]
        rows.append([stage, f"{end - start:.1f}", str(len(gaps)), *figures, f"{longest / median:.2f}"])
    header = ("stage", "seconds", "chunks", "median ms", "99% ms", "longest ms", "without a prompt ms", "over median")
    shown = table(header, rows)
    console.print(shown)
    parts = [f"Active at the end: {active}. {load.describe()}.", shown]
    write_page(output, "A swap of drafts under traffic", machine_line(), parts)


if __name__ == "__main__":
    typer.run(main)
