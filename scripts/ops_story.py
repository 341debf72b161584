"""The operations story: a draft's acceptance collapses, somebody is told, a Job repairs it. On one machine, no mocks.

    python -m scripts.ops_story --output build/ops-story

A real Prometheus scrapes `redraft-server`, a real Alertmanager sends what fires to a webhook, an S3 server holds log
and registry. A bank's help desk is served by a draft that learnt its traffic; then another application comes and asks
for SQL. The collapse alert fires, and the runbook's answer is given: the CronJob's Job, now. Server, Job and alerts are
what the chart renders: environment, arguments and rules are taken from its manifests.

The clock is ten times faster than in production: see `SPEED`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from redraft_client.aio import AsyncClient
from redraft_client.types import Message
from scripts.demo_traffic import DemoPrompt, Domain, prompts
from scripts.monitoring_process import Alertmanager, Prometheus, Scraped, Webhook
from scripts.ops_story_chart import ROOT, TOOLS, Container, Manifest, container, faster_rules, one, render
from scripts.ops_story_timeline import COLLAPSED, Moment, Timeline, save
from scripts.s3_process import ACCESS_KEY, REGION, SECRET_KEY, S3Process
from scripts.server_process import ServerProcess

SPEED = 10.0
"""All durations of the rules (`for`, ranges) are divided by this, and so are the intervals of the next line."""
SCRAPE_S, EVALUATION_S = 15.0 / SPEED, 30.0 / SPEED

STREAMS = 6
MAX_NEW_TOKENS = 48
BUCKET = "story"
PATIENCE_S = 420.0
"""Longest wait for any one thing."""
STEADY_S = 60.0
"""How long the help desk is watched before the drift, so that the picture has a before."""
CALM_S = 30.0
"""And how long after the end."""

# Kubernetes mounts these for the containers; here they are the user's own cache
_MOUNTED = ("HOME", "HF_HOME", "REDRAFT_CACHE_DIR")

console = Console(highlight=False)


def values(s3_port: int) -> dict[str, Any]:
    """The release. Everything is decided on little, since a story's traffic is little."""
    training = {
        "draft": "demo-draft",
        "distill.epochs": 6,
        "distill.batch_tokens": 768,
        "distill.learning_rate": 0.0015,
        "data.held_out_share": 0.15,
        "data.min_new_tokens": 1000,
        "data.recent_examples": 200,
        "gate.min_positions": 200,
        "gate.min_domain_positions": 150,
    }
    config = {
        "model": {"target": "demo", "draft": "demo-draft"},
        "speculation": {"proposer": "draft_model"},
        "traffic_log": {"roll_seconds": 3},
        "registry": {"poll_s": 1},
        "rollout": {"shadow_positions": 100, "shadow_share": 1.0, "canary_share": 0.3, "canary_max_s": 120},
        "logging": {"format": "text"},
    }
    one_core = {"limits": {"cpu": 1}}
    return {
        "server": {"config": config, "resources": one_core},
        "storage": {
            "trafficLog": {"type": "url", "url": f"s3://{BUCKET}/traffic"},
            "registry": {"type": "url", "url": f"s3://{BUCKET}/drafts"},
            "work": {"type": "newClaim"},
        },
        "objectStore": {"existingSecret": "s3", "endpointUrl": f"http://127.0.0.1:{s3_port}", "region": REGION},
        "retraining": {
            "cron": {"enabled": True},
            "args": [text for name, value in training.items() for text in ("--set", f"{name}={value}")],
            "resources": one_core,
        },
        "metrics": {"prometheusRule": {"enabled": True}},
    }


@dataclass
class Cluster:
    """What Kubernetes would be: the manifests, and a folder in place of its volumes."""

    manifests: list[Manifest]
    folder: Path

    def server(self) -> ServerProcess:
        """The Deployment's container, on loopback."""
        pod = one(self.manifests, "Deployment")["spec"]["template"]
        flags = ["--grpc.host", "127.0.0.1", "--metrics.host", "127.0.0.1"]
        environment = self._environment(container(pod, self._secret))
        return ServerProcess(flags, environment=environment, start_timeout_s=PATIENCE_S)

    def run_job(self) -> int:
        """What `kubectl create job --from=cronjob/...` would run: the CronJob's container. Returns its exit status."""
        job = one(self.manifests, "CronJob")["spec"]["jobTemplate"]["spec"]
        trainer = container(job["template"], self._secret)
        volumes = str(self.folder / "volumes")
        arguments = [text.replace("/var/lib/redraft", volumes) for text in trainer.args]
        console.print(f"[bold]$ {' '.join(trainer.args)}[/]", soft_wrap=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, **self._environment(trainer), "PATH": path}
        entrypoint = [sys.executable, str(ROOT / "scripts" / "image_entrypoint.py")]
        return subprocess.run([*entrypoint, *arguments], env=environment, check=False).returncode

    @property
    def _secret(self) -> Mapping[str, str]:
        return {"access-key-id": ACCESS_KEY, "secret-access-key": SECRET_KEY}

    def _environment(self, of: Container) -> dict[str, str]:
        return {name: value for name, value in of.environment.items() if name not in _MOUNTED}


@dataclass
class Traffic:
    """Clients that ask without a pause, each of its streams one request after the other."""

    client: AsyncClient
    domain: Domain = "support"
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    _prompts: dict[Domain, Iterator[DemoPrompt]] = field(default_factory=dict)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        streams = [asyncio.create_task(self._stream()) for _ in range(STREAMS)]
        try:
            yield
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _stream(self) -> None:
        while True:
            prompt = self._next()
            messages = [Message(role="system", content=prompt.system), Message(role="user", content=prompt.text)]
            sampling: Any = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": MAX_NEW_TOKENS}
            try:
                await self.client.generate(messages, domain=prompt.domain, **sampling)
                self.num_done += 1
            except Exception as error:
                self.failures.append(str(error))
                await asyncio.sleep(1.0)  # as a client would, rather than asking a broken server again at once

    def _next(self) -> DemoPrompt:
        if self.domain not in self._prompts:
            number = {"support": 240, "sql": 190}[self.domain]
            self._prompts[self.domain] = itertools.cycle(prompts(self.domain, "traffic", number))
        return next(self._prompts[self.domain])


@dataclass
class Story:
    """The stages, and when what happened by our own clock."""

    cluster: Cluster
    client: AsyncClient
    traffic: Traffic
    webhook: Webhook
    moments: list[Moment] = field(default_factory=list)

    async def tell(self) -> None:
        console.rule("1. A help desk; the draft learns its traffic")
        async with self.traffic.flowing():
            await self._logged(130)
            first = await self._retrain("first run")
            await self._serves(first)
            await asyncio.sleep(STEADY_S)  # nothing to wait for: this is the before of the picture
            console.rule("2. Another application comes: questions to SQL")
            self.traffic.domain = "sql"
            self._note("the traffic changes: SQL instead of a help desk")
            await self._notified("firing")
            console.rule("3. The runbook's answer: the CronJob's Job, now")
            second = await self._retrain("Job")
            await self._serves(second)
            console.rule("4. The new draft serves")
            await self._notified("resolved")
            await asyncio.sleep(CALM_S)  # the after

    async def _logged(self, requests: int) -> None:
        with console.status(f"Traffic of {self.traffic.domain} ..."):
            await self._until(lambda: self.traffic.num_done >= requests, f"{requests} requests were not served")

    async def _retrain(self, name: str) -> str:
        """Run the Job; the version that it published."""
        before = (await self.client.get_draft()).version
        self._note(f"{name}: started")
        status = await asyncio.to_thread(self.cluster.run_job)
        self._note(f"{name}: ended with status {status}")
        promised = [one for one in await self.client.list_drafts() if one.expected_acceptance is not None]
        if status != 0 or not promised or promised[0].version == before:
            raise RuntimeError(f"the {name} ended with {status} and published nothing; its messages are above")
        return promised[0].version  # newest first

    async def _serves(self, version: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        with console.status(f"The server tries {version}: shadow, canary, promotion ..."):
            while (active := (await self.client.get_draft()).version) != version:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{active} still serves, and not {version}")
                await asyncio.sleep(0.5)
        console.print(f"[green]{version} serves[/]\n")

    async def _notified(self, status: str) -> None:
        with console.status(f"Until {COLLAPSED} is {status} ..."):
            found = await asyncio.to_thread(self.webhook.wait_for, COLLAPSED, status, PATIENCE_S)
        self.moments.append(Moment(found.received_unix_s, f"Alertmanager notifies: {status}", "webhook"))
        console.print(f"[red]{status}[/]: {found.annotations['summary']}\n")

    async def _until(self, condition: Any, failure: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(failure)
            await asyncio.sleep(0.5)

    def _note(self, what: str) -> None:
        self.moments.append(Moment(time.time(), what, "script"))


def main(output: Annotated[Path, typer.Option(help="Folder for timeline.png, timeline.md and timeline.json.")]) -> None:
    """Collapse, alert, Job, rollout, resolved: about a quarter of an hour on two cores."""
    folder = output / "run"
    folder.mkdir(parents=True, exist_ok=False)
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(S3Process(ROOT / "build" / "tools" / "s3" / "bin" / "python"))
        s3.make_bucket(BUCKET)
        cluster = Cluster(render(values(s3.port)), folder)
        webhook = stack.enter_context(Webhook())
        alertmanager = stack.enter_context(Alertmanager(TOOLS / "alertmanager", folder / "alertmanager", webhook.url))
        with console.status("The server starts ..."):
            server = stack.enter_context(cluster.server())
        prometheus = stack.enter_context(
            Prometheus(
                TOOLS / "prometheus",
                folder / "prometheus",
                [Scraped(server.metrics_address, {"namespace": "default", "pod": "story-redraft-0"})],
                rules=faster_rules(cluster.manifests, SPEED, shortest_s=4 * SCRAPE_S),
                alertmanager=alertmanager.address,
                scrape_s=SCRAPE_S,
                evaluation_s=EVALUATION_S,
            )
        )
        started = time.time()
        moments, traffic = asyncio.run(_tell(server.address, cluster, webhook))
        timeline = Timeline.read(prometheus, moments, webhook.received, started, time.time(), step=EVALUATION_S)
    save(timeline, output)
    (output / "requests.json").write_text(json.dumps({"done": traffic.num_done, "failures": traffic.failures}) + "\n")
    console.print(f"{traffic.num_done} requests, {len(traffic.failures)} failed; see {output}")


async def _tell(address: str, cluster: Cluster, webhook: Webhook) -> tuple[list[Moment], Traffic]:
    async with AsyncClient(address) as client:
        story = Story(cluster, client, Traffic(client), webhook)
        await story.tell()
        return story.moments, story.traffic


if __name__ == "__main__":
    typer.run(main)
