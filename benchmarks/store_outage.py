"""What two minutes without the object store cost a server with traffic: requests, time, records.

    make tools
    python -m benchmarks.store_outage

A real S3 server (moto), a proxy before it that first breaks every connection off and then lets every request hang, a
server with the default settings but for its shards, which are closed every few seconds, and clients that do not stop.
At the end every record is looked for in the log, by request id.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.machine import machine_line
from benchmarks.prompts import DataOption, load_prompts
from benchmarks.report import RESULTS, table, write_page
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import load_tokenizer
from redraft.traffic.reader import TrafficReader
from redraft_client.aio import AsyncClient
from redraft_client.errors import RedraftClientError
from scripts.s3_process import S3Process, environment
from scripts.server_process import ServerProcess
from scripts.tcp_proxy import TcpProxy

S3_PYTHON = Path("build", "tools", "s3", "bin", "python")
BUCKET = "outage"
BEFORE, BROKEN, HANGING, AFTER = "there", "breaks off", "hangs", "back"
ROLL_SECONDS = 5.0
DRAIN_S = 180.0
"""Longest that the spool may take to empty: twice the longest wait between two tries, and some."""

console = Console()


@dataclass(frozen=True, slots=True)
class Call:
    """One request. Monotonic seconds; `error` is the name of an exception, empty if it ended as it should."""

    request_id: str
    start: float
    seconds: float
    error: str


@dataclass
class Run:
    """What was seen."""

    calls: list[Call] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # name, start, end
    peak_spool_bytes: float = 0.0
    drained_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    logged: list[str] = field(default_factory=list)

    def look(self, phase: str, elapsed_s: float, metrics: dict[str, float]) -> None:
        """Take in the server's figures, so many seconds after a phase began."""
        self.metrics = metrics
        self.peak_spool_bytes = max(self.peak_spool_bytes, metrics["spool_bytes"])
        # what waits now was written since
        if phase == AFTER and not self.drained_s and metrics["spool_oldest_seconds"] < elapsed_s:
            self.drained_s = elapsed_s

    def missing(self, calls: Sequence[Call]) -> list[str]:
        """Of the calls that ended as they should, those without a record."""
        return sorted({call.request_id for call in calls if not call.error} - set(self.logged))


def main(
    target: Annotated[str, typer.Option(help="The target: demo, a directory, or a Hugging Face id.")] = "demo",
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of the outage; half broken, half hanging.")] = 120.0,
    quiet: Annotated[float, typer.Option(min=1.0, help="Seconds before the outage, and after it.")] = 60.0,
    clients: Annotated[int, typer.Option(min=1, help="Clients, each with one request at a time.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = RESULTS / "store_outage.md",
) -> None:
    """Take the store away under traffic; write a Markdown page. Fails if a request failed or a record is missing."""
    tokenizer = load_tokenizer(ModelRef.parse(target))
    prompts = sorted((prompt.token_ids(tokenizer) for prompt in load_prompts(data, 64).prompts), key=len)[:16]
    plan = [(BEFORE, quiet), (BROKEN, seconds / 2), (HANGING, seconds / 2), (AFTER, quiet)]
    with S3Process(S3_PYTHON) as s3, TcpProxy(s3.port) as proxy, tempfile.TemporaryDirectory() as spool:
        s3.make_bucket(BUCKET)
        flags = ["--model.target", target, "--traffic_log.url", f"s3://{BUCKET}/traffic", "--traffic_log.spool_dir"]
        flags += [spool, "--traffic_log.roll_seconds", str(ROLL_SECONDS)]
        with ServerProcess(flags, environment=environment(proxy.port), start_timeout_s=900.0) as server:
            run = asyncio.run(_drive(server, proxy, prompts, plan, clients, new_tokens))
        run.logged = _request_ids(s3)
    write_page(output, "An outage of the object store", machine_line() + ".", _parts(run, seconds, clients, new_tokens))
    typer.echo(output.read_text(encoding="utf-8"))
    if any(call.error for call in run.calls) or run.missing(run.calls):
        raise typer.Exit(1)


async def _drive(
    server: ServerProcess,
    proxy: TcpProxy,
    prompts: Sequence[tuple[int, ...]],
    plan: Sequence[tuple[str, float]],
    num_clients: int,
    new_tokens: int,
) -> Run:
    """The phases under load, then the time until everything is in the log."""
    run = Run()
    stop = asyncio.Event()
    change = {BROKEN: proxy.down, HANGING: proxy.stall}
    async with AsyncClient(server.address) as client:
        load = [
            asyncio.create_task(_client(client, f"c{number}", prompts[number:], new_tokens, run, stop))
            for number in range(num_clients)
        ]
        for name, seconds in plan:
            change.get(name, proxy.up)()
            started = time.monotonic()
            while (now := time.monotonic()) < started + seconds:
                await asyncio.sleep(min(1.0, started + seconds - now))
                run.look(name, time.monotonic() - started, await _metrics(server))
            run.phases.append((name, started, time.monotonic()))
            console.print(f"{name}: {len(run.calls)} requests so far")
        stop.set()
        await asyncio.gather(*load)
    restored = run.phases[-1][1]
    while time.monotonic() < restored + DRAIN_S:
        run.look(run.phases[-1][0], time.monotonic() - restored, await _metrics(server))
        if run.metrics["records"] >= len(run.calls):
            break
        await asyncio.sleep(1.0)
    return run


async def _client(
    client: AsyncClient,
    name: str,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    run: Run,
    stop: asyncio.Event,
) -> None:
    number = 0
    while not stop.is_set():
        request_id, prompt = f"{name}-{number:05}", list(prompts[number % len(prompts)])
        started, error = time.monotonic(), ""
        try:
            await client.generate(
                prompt, request_id=request_id, max_new_tokens=new_tokens, ignore_eos=True, seed=number
            )
        except RedraftClientError as caught:
            error = type(caught).__name__
        run.calls.append(Call(request_id, started, time.monotonic() - started, error))
        number += 1


async def _metrics(server: ServerProcess) -> dict[str, float]:
    """The traffic log's figures, by short names."""

    def fetch() -> str:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=30) as reply:
            text: str = reply.read().decode()
            return text

    found = {"records": 0.0, "dropped": 0.0}
    for family in text_string_to_metric_families(await asyncio.to_thread(fetch)):
        for sample in family.samples:
            if sample.name == "redraft_traffic_log_records_total":
                found["records"] += sample.value
                found["dropped"] += sample.value if sample.labels["result"] == "dropped" else 0.0
            elif sample.name.startswith("redraft_traffic_log_"):
                found[sample.name.removeprefix("redraft_traffic_log_")] = sample.value
    return found


def _request_ids(s3: S3Process) -> list[str]:
    """What is in the log, read past the proxy."""
    os.environ.update(environment(s3.port))
    return [record.request_id for record in TrafficReader(f"s3://{BUCKET}/traffic").iter_records()]


def _parts(run: Run, seconds: float, clients: int, new_tokens: int) -> list[str]:
    rows = []
    for name, start, end in run.phases:
        calls = [call for call in run.calls if start <= call.start < end]
        times = [call.seconds for call in calls]
        rows.append(
            [
                name,
                f"{end - start:.0f}",
                str(len(calls)),
                str(sum(bool(call.error) for call in calls)),
                *(f"{numpy.quantile(times, share):.2f}" if times else "-" for share in (0.5, 0.95)),
                str(len(run.missing(calls))),
            ]
        )
    errors = Counter(call.error for call in run.calls if call.error)
    missing, twice = run.missing(run.calls), len(run.logged) - len(set(run.logged))
    tries, dropped = run.metrics["upload_failures_total"], run.metrics["dropped"]
    return [
        f"{clients} clients, each with one request of {new_tokens} new tokens at a time; no store for {seconds:.0f} s.",
        table(("store", "s", "requests", "failed", "p50 s", "p95 s", "records missing"), rows),
        f"Of {len(run.calls)} requests {errors.total()} failed{_named(errors)}; of their records {len(missing)} are "
        f"missing from the log and {twice} are there twice. {tries:.0f} tries to send a shard failed, {dropped:.0f} "
        f"records were dropped, at most {run.peak_spool_bytes / 2**10:.0f} KiB waited in the spool, and what had "
        f"waited was in the store {run.drained_s:.0f} s after it was back.",
    ]


def _named(errors: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in errors.items())})" if errors else ""


if __name__ == "__main__":
    typer.run(main)
