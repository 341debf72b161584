"""A real server under traffic, scraped by a real Prometheus, through everything that an alert or a panel is about.

Tiny models, the chart's own rules with limits that are always passed, and a clock so fast that ten seconds stand for
twelve hours: within a minute every alert fires.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from redraft.registry.store import DraftRegistry
from redraft_client.aio import AsyncClient
from redraft_client.channel import Tls
from redraft_client.errors import RedraftClientError
from scripts.monitoring_process import Alertmanager, Notification, Prometheus, Scraped, Webhook
from scripts.ops_story_chart import faster_rules, render
from scripts.s3_process import S3Process
from scripts.s3_process import environment as s3_environment
from scripts.server_process import ServerProcess
from scripts.tcp_proxy import TcpProxy
from tests.certificates import Authority, TlsFiles
from tests.ops.charts import require
from tests.ops.test_alerts import ALERTS
from tests.rollout_harness import GOOD, POOR, POOR_TOO, Checkpoints, Publisher

PATIENCE_S = 300.0
SCRAPE_S, WINDOW_S = 1.0, 10.0
KEY = "redraft_key-of-the-crowd"
CROWD = 24
"""Clients at a time: eight run, eight wait, and the rest are refused."""

SERVER = (
    *("--speculation.proposer", "draft_model", "--speculation.num_speculative_tokens", "3"),
    *("--speculation.adaptive", "false", "--model.threads", "1"),
    # too little of everything: requests are preempted and refused, records dropped
    *("--engine.kv_cache_tokens", "384", "--engine.kv_block_size", "4", "--engine.max_batch_tokens", "64"),
    *("--engine.max_running_requests", "8", "--engine.max_waiting_requests", "8"),
    *("--traffic_log.max_queue_records", "1", "--traffic_log.roll_seconds", "0.5"),
    *("--registry.poll_s", "0.2", "--rollout.margin", "0.1", "--rollout.canary_share", "0.5"),
    *("--rollout.shadow_positions", "60", "--rollout.shadow_share", "1.0"),
)
ALWAYS_PASSED = {
    "acceptanceOfPromise": 1000,
    "acceptanceOfPrevious": 1000,
    "draftAgeSeconds": 1,
    "refusedDrafts": 1,
    "captureDropRatio": 1e-6,
    "captureDelaySeconds": 1,
    "timeToFirstTokenSeconds": 1e-6,
    "interTokenSeconds": 1e-6,
    "certificateSeconds": 10**9,
    "requestsWaiting": 0.01,
    "errorRatio": 1e-6,
    "retrainingAgeSeconds": 60,
}
KUBE_STATE_METRICS = """\
kube_job_failed{namespace="ns",job_name="story-redraft-retrain-1",condition="true"} 1
kube_cronjob_status_last_successful_time{namespace="ns",cronjob="story-redraft-retrain"} 1
kube_cronjob_spec_suspend{namespace="ns",cronjob="story-redraft-retrain"} 0
"""
"""There is no cluster to take these from, so that the two alerts on Jobs meet the exporter's format only."""


@dataclass(frozen=True)
class LiveRun:
    """What is there afterwards. `metrics_page` is the server's, near the end of its traffic."""

    prometheus: Prometheus
    started: float
    ended: float
    notifications: list[Notification]
    metrics_page: str


@contextmanager
def live_run(folder: Path) -> Iterator[LiveRun]:
    """Run the whole; Prometheus answers until the context is left."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("NOT TESTED, Alertmanager: this machine allows no user namespaces")
    programs = {name: require(name) for name in ("prometheus", "alertmanager", "helm4", "moto_server")}
    checkpoints = Checkpoints(folder)
    publisher = Publisher(checkpoints, DraftRegistry(str(folder / "registry")))
    authority = Authority()
    tls = TlsFiles(folder, authority)
    keys = folder / "keys.json"
    keys.write_text(
        json.dumps({"tenants": {"crowd": {"keys": [{"sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}}})
    )
    values = {"metrics": {"prometheusRule": {"enabled": True, "thresholds": ALWAYS_PASSED}}}
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(S3Process(programs["moto_server"].with_name("python")))
        s3.make_bucket("live")
        store = stack.enter_context(TcpProxy(s3.port))
        server = ServerProcess(
            [
                *("--model.target", str(checkpoints.target), "--registry.url", publisher.registry.url),
                *("--traffic_log.url", "s3://live/traffic", "--traffic_log.spool_dir", str(folder / "spool")),
                *("--grpc.tls_cert", str(tls.cert), "--grpc.tls_key", str(tls.key), "--auth.keys_file", str(keys)),
                *SERVER,
            ],
            environment=s3_environment(store.port),
            credentials=authority.channel(),
            start_timeout_s=PATIENCE_S,
        )
        webhook = stack.enter_context(Webhook())
        kube_state_metrics = stack.enter_context(static_page(KUBE_STATE_METRICS))
        alertmanager = Alertmanager(programs["alertmanager"], folder / "alertmanager", webhook.url)
        prometheus = Prometheus(
            programs["prometheus"],
            folder / "prometheus",
            [
                Scraped(server.metrics_address, {"namespace": "ns", "pod": "redraft-0"}),
                Scraped(kube_state_metrics, {}),
            ],
            rules=faster_rules(render(values), speed=12 * 3600 / WINDOW_S, shortest_s=WINDOW_S),
            alertmanager=alertmanager.address,
            scrape_s=SCRAPE_S,
            evaluation_s=SCRAPE_S,
        )
        for process in (alertmanager, server, prometheus):
            stack.enter_context(process)
        started = time.time()
        page = asyncio.run(_Story(server, prometheus, webhook, publisher, store, tls, authority).tell())
        ended = time.time()
        server.terminate()
        webhook.wait_for("RedraftTargetAbsent", "firing", PATIENCE_S)
        yield LiveRun(prometheus, started, ended, webhook.received, page)


@dataclass
class _Story:
    server: ServerProcess
    prometheus: Prometheus
    webhook: Webhook
    publisher: Publisher
    store: TcpProxy
    tls: TlsFiles
    authority: Authority

    async def tell(self) -> str:
        """What the alerts are about, one after the other, under traffic that never stops; the server's metrics."""
        publish = self.publisher.publish
        async with self.traffic():
            await self.fires("RedraftSpeculationOff")  # the registry is empty
            publish(POOR, promised=0.2, created_unix_s=time.time() - 3600.0)
            await self.shows('redraft_draft_info{role="active"} == 1')
            publish(GOOD, promised=0.9, created_unix_s=time.time() - 1800.0)
            await self.fires("RedraftRegressionAfterSwap")
            publish(POOR_TOO, promised=0.9, created_unix_s=time.time())
            await self.fires("RedraftCanaryRolledBack")
            publish(POOR, make_current=False, tokenizer_fingerprint="sha256:" + "1" * 64)
            await self.shows('redraft_registry_errors_total{operation="load"} > 0')
            self.refuse()
            await self.fires("RedraftGateRefusing")
            with self.registry_away():
                await self.fires("RedraftRegistryUnavailable")
            self.store.down()
            await self.fires("RedraftCaptureDelayed")
            self.store.up()
            self.tls.key.write_text("half a file")
            await self.fires("RedraftCredentialsNotTaken")
            for alert in ALERTS.keys() - {"RedraftTargetAbsent"}:  # without an occasion of their own: load, time
                await self.fires(alert)
            return await asyncio.to_thread(self.read_metrics)

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """A crowd that asks for more than the server has room for, and a stranger."""
        numbers = itertools.count()

        async def keep_asking(client: AsyncClient, pause_s: float = 0.0) -> None:
            while True:
                with contextlib.suppress(RedraftClientError):  # the queue is full, or no key
                    text = f"the same beginning, and number {next(numbers) % 50}"
                    await client.generate(text, max_new_tokens=48, ignore_eos=True, temperature=0.8)
                await asyncio.sleep(pause_s)

        tls = Tls(root_certificates=self.authority.pem, server_name="localhost")
        address = self.server.address
        async with AsyncClient(address, tls=tls, api_key=KEY) as client, AsyncClient(address, tls=tls) as stranger:
            crowd = [asyncio.create_task(keep_asking(client)) for _ in range(CROWD)]
            crowd.append(asyncio.create_task(keep_asking(stranger, pause_s=1.0)))
            try:
                yield
            finally:
                for one in crowd:
                    one.cancel()
                await asyncio.gather(*crowd, return_exceptions=True)

    async def fires(self, alert: str) -> None:
        """The alert has come out of Alertmanager."""
        await asyncio.to_thread(self.webhook.wait_for, alert, "firing", PATIENCE_S)

    async def shows(self, query: str) -> None:
        """Prometheus has scraped something."""
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(self.prometheus.query, query):
                await asyncio.sleep(0.2)  # polling another process, which has no other way to tell

    def refuse(self) -> None:
        """What the gate does with a draft that is no better."""
        (version, *_) = self.publisher.registry.versions()
        manifest = self.publisher.registry.get(version).manifest.model_copy(update={"version": "refused"})
        self.publisher.registry.refuse(self.publisher.checkpoints.draft(POOR), manifest, "the interval includes zero")

    @contextmanager
    def registry_away(self) -> Iterator[None]:
        """The disk is not mounted for a while."""
        registry = Path(self.publisher.registry.url)
        elsewhere = registry.rename(registry.with_name("elsewhere"))
        try:
            yield
        finally:
            elsewhere.rename(registry)

    def read_metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=PATIENCE_S) as reply:
            page: bytes = reply.read()
            return page.decode()


@contextmanager
def static_page(text: str) -> Iterator[str]:
    """An address where Prometheus finds these metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Not worth a line each."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
