"""The demo: one draft's life, on a real server and the demo model.

    python -m scripts.demo --draft build/demo-draft --output build

An application asks for SQL; the server's draft is only a pruned copy of the target and guesses badly. Its traffic is
distilled into a better draft, which passes the gate and goes into service while the server runs. Then another
application comes, a bank's help desk: acceptance falls, the draft learns that too, and keeps what it knew.

Every part is the product's own: `redraft-server`, its traffic log, `redraft-train run`, the registry, the canary.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from redraft.registry.store import DraftRegistry
from redraft.traffic.reader import TrafficReader
from redraft_client.aio import AsyncClient
from scripts.demo_client import Measurement, measure, send
from scripts.demo_plot import plot
from scripts.demo_traffic import DemoPrompt, Domain, prompts
from scripts.server_process import ServerProcess

NUM_TRAFFIC, NUM_EVALUATION = 130, 10
PATIENCE_S = 180.0

# A demo's traffic is small, so everything decides on less than it would in production.
SERVER = (
    *("--model.target", "demo", "--speculation.proposer", "draft_model"),
    *("--traffic_log.roll_seconds", "3", "--registry.poll_s", "1"),
    *("--rollout.shadow_positions", "40", "--rollout.shadow_share", "1.0", "--rollout.canary_share", "0.5"),
)
TRAINING = (
    *("--set", "distill.epochs=8", "--set", "distill.batch_tokens=768", "--set", "distill.learning_rate=0.0015"),
    *("--set", "data.held_out_share=0.15", "--set", "data.min_new_tokens=1000"),
    *("--set", "student.quantise=int8"),
    *("--set", "gate.min_positions=200", "--set", "gate.min_domain_positions=150"),
)

console = Console()


@dataclass
class Demo:
    """The server that runs, where its files are, and what was measured so far."""

    client: AsyncClient
    folder: Path
    evaluation: dict[Domain, list[DemoPrompt]]
    rows: list[Measurement] = field(default_factory=list)

    @property
    def registry(self) -> Path:
        return self.folder / "drafts"

    @property
    def traffic(self) -> Path:
        return self.folder / "traffic"

    async def serve(self, title: str, traffic: Sequence[DemoPrompt]) -> None:
        """Send an application's traffic and wait until the log has it."""
        wanted = self._num_logged() + len(traffic)
        with _bar() as progress:
            task = progress.add_task(title, total=len(traffic))
            await send(self.client, traffic, on_done=lambda: progress.advance(task))
        await _until(lambda: self._num_logged() >= wanted, "the traffic log did not get every record")

    def retrain(self) -> str:
        """One cycle of `redraft-train run`; the version that it published. Raises RuntimeError if it did not."""
        command = [
            *(sys.executable, "-m", "redraft_training", "run", "--target", "demo"),
            *("--traffic", str(self.traffic), "--registry", str(self.registry)),
            *("--work-dir", str(self.folder / "retraining"), "--set", f"draft={self.folder / 'first'}", *TRAINING),
        ]
        console.print(f"[bold]$ redraft-train {' '.join(command[3:])}[/]", highlight=False, soft_wrap=True)
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            raise RuntimeError(f"redraft-train run ended with {status}; its messages are above")
        current = DraftRegistry(str(self.registry)).current()
        assert current is not None
        return current.version

    async def wait_for(self, version: str, traffic: Sequence[DemoPrompt]) -> None:
        """Keep traffic coming until the server has shadow-scored, tried and promoted a version."""
        started = time.monotonic()
        with console.status(f"The server tries {version}: shadow, canary, promotion ..."):
            while (active := (await self.client.get_draft()).version) != version:
                if time.monotonic() - started > PATIENCE_S:
                    raise RuntimeError(f"{active} still serves, and not {version}")
                await send(self.client, traffic, log=False)
        console.print(f"[green]{version} serves[/] after {time.monotonic() - started:.0f} s, without a pause\n")

    async def measure(self, stage: str, *domains: Domain) -> None:
        version = (await self.client.get_draft()).version
        for domain in domains:
            with console.status(f"Measuring {domain} ..."):
                row = await measure(self.client, stage, version, self.evaluation[domain])
            self.rows.append(row)
            console.print(
                f"  {domain}: {row.acceptance_rate:.0%} of the drafted tokens accepted, "
                f"{row.tokens_per_s:.0f} tokens/s ({row.tokens_per_s_plain:.0f} without speculation)\n",
                highlight=False,
            )

    def _num_logged(self) -> int:
        return sum(1 for _ in TrafficReader(str(self.traffic)).iter_records(on_problem=lambda _: None))


async def story(demo: Demo) -> None:
    """The stages, in order."""
    sql, support = prompts("sql", "traffic", NUM_TRAFFIC), prompts("support", "traffic", NUM_TRAFFIC)
    console.rule("1. An application asks for SQL; the draft is a pruned copy of the target")
    await demo.serve("SQL traffic", sql)
    await demo.measure("pruned draft", "sql", "support")
    console.rule("2. The draft is distilled from that traffic and goes into service")
    version = await asyncio.to_thread(demo.retrain)
    await demo.wait_for(version, sql[:24])
    await demo.measure("learnt sql", "sql")
    console.rule("3. Another application comes: a bank's help desk")
    await demo.serve("Help desk traffic", support)
    await demo.measure("drift to support", "support")
    console.rule("4. The draft learns that too, with replay of what it knew")
    version = await asyncio.to_thread(demo.retrain)
    await demo.wait_for(version, support[:24])
    await demo.measure("learnt support", "support", "sql")


def main(
    draft: Annotated[Path, typer.Option(help="The pruned draft's checkpoint directory (`make model` makes it).")],
    output: Annotated[Path, typer.Option(help="Folder for demo.json, demo.png and what the demo leaves.")],
) -> None:
    """Serve, distil, gate, hot-swap, drift, recover: about a quarter of an hour on two cores."""
    folder = output / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(draft, folder / "first")
    started = time.monotonic()
    flags = [
        *SERVER,
        *("--model.draft", str(folder / "first"), "--registry.url", str(folder / "drafts")),
        *("--traffic_log.url", str(folder / "traffic")),
    ]
    console.print(f"[bold]$ redraft-server {' '.join(flags)}[/]\n", highlight=False, soft_wrap=True)
    with ServerProcess(flags) as server:
        rows = asyncio.run(_run(server.address, folder))
    _show(rows)
    (output / "demo.json").write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")
    plot(rows, output / "demo.png")
    console.print(
        f"\n{output / 'demo.json'}, {output / 'demo.png'}; the reports of both cycles are in the registry, "
        f"{folder / 'drafts'}. It took {(time.monotonic() - started) / 60:.0f} minutes."
    )


async def _run(address: str, folder: Path) -> list[Measurement]:
    domains: tuple[Domain, ...] = ("sql", "support")
    async with AsyncClient(address) as client:
        demo = Demo(client, folder, {name: prompts(name, "evaluation", NUM_EVALUATION) for name in domains})
        await story(demo)
        return demo.rows


async def _until(condition: object, failure: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(failure)
        await asyncio.sleep(0.5)


def _bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def _show(rows: Sequence[Measurement]) -> None:
    table = Table(title="One draft's life")
    for name in ("stage", "domain", "draft", "alpha", "acceptance", "length", "tokens/s", "plain", "ratio"):
        table.add_column(name, justify="left" if name in ("stage", "domain", "draft") else "right")
    for row in rows:
        table.add_row(
            *(row.stage, row.domain, row.draft_version[-8:], f"{row.alpha:.2f}", f"{row.acceptance_rate:.2f}"),
            *(f"{row.mean_acceptance_length:.2f}", f"{row.tokens_per_s:.0f}", f"{row.tokens_per_s_plain:.0f}"),
            f"{row.tokens_per_s / row.tokens_per_s_plain:.2f}",
        )
    console.print(table)
    same = all(row.same_text for row in rows)
    console.print(f"Same text with and without speculation, at every stage: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    typer.run(main)
