"""The demo: a real server on the demo model, prompts streamed with and without speculation, and what it measured.

    python -m scripts.demo --draft build/demo-draft --output build/demo.json

Starts `redraft-server` as a process of its own on free ports, talks to it through the public client, reads its
`/metrics`, and stops it with SIGTERM. Plain and speculative rounds alternate, so that a machine that grows slower or
faster during the demo treats both alike.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.request import urlopen

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from redraft_client.aio import AsyncClient
from redraft_client.types import GenerationResult, Message
from scripts.server_process import ServerProcess

MAX_NEW_TOKENS = 96
ROUNDS = 2
CONCURRENCY = 4

# Half open questions, half tasks that work on a given text, as applications send them.
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a dragon who learns to bake bread.",
    "Give me three tips for sleeping better.",
    "Explain in simple words why the sky is blue.",
    "Correct the spelling and repeat the text: 'The comitee has recieved your aplication. The comitee will "
    "anounce its desicion on your aplication next wendesday. Untill then, please do not contact the comitee.'",
    "Add a docstring to every function and show the whole code again:\n\n"
    "def area(width, height):\n    return width * height\n\n"
    "def volume(width, height, depth):\n    return area(width, height) * depth\n",
    "Turn this list into one JSON array of objects with the keys name and city: "
    "Anna Berg, Oslo; Paul Klein, Vienna; Maria Rossi, Milan; Jean Dupont, Lyon.",
    "Summarize: Speculative decoding lets a small draft model propose several tokens, which the large target model "
    "then verifies in one forward pass. Accepted tokens cost one pass together instead of one pass each. The output "
    "of speculative decoding follows the same distribution as the output of the target model alone.",
)

console = Console()


@dataclass(frozen=True)
class Round:
    """One pass over all prompts."""

    results: list[GenerationResult]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(result.usage.completion_tokens for result in self.results)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def main(
    draft: Annotated[Path, typer.Option(help="The draft's checkpoint directory (`make model` makes it).")],
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("build/demo.json"),
) -> None:
    """Serve the demo model, stream prompts, print acceptance and speed with and without speculation."""
    flags = ["--model.target", "demo", "--model.draft", str(draft), "--speculation.proposer", "ngram+draft_model"]
    console.print(f"[bold]Starting[/] redraft-server {' '.join(flags)}")
    with ServerProcess(flags) as server:
        console.print(f"Serving on {server.address}, metrics on http://{server.metrics_address}/metrics\n")
        plain, speculative = asyncio.run(_run(server.address))
        with urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
            metrics = [
                line for line in page.read().decode().splitlines() if line.startswith("redraft_spec_decode_num_")
            ]
    console.print("The server has stopped.\n")
    _show_texts(speculative[0])
    figures = _figures(plain, speculative)
    _show(figures, metrics, same=_texts(plain[0]) == _texts(speculative[0]))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"\nFigures written to {output}")


async def _run(address: str) -> tuple[list[Round], list[Round]]:
    plain: list[Round] = []
    speculative: list[Round] = []
    with Progress(console=console) as progress:
        task = progress.add_task("Streaming", total=(2 * ROUNDS + 1) * len(PROMPTS))

        def advance() -> None:
            progress.advance(task)

        async with AsyncClient(address) as client:
            await _round(client, False, advance)  # warms caches for both
            for _ in range(ROUNDS):
                plain.append(await _round(client, False, advance))
                speculative.append(await _round(client, True, advance))
    return plain, speculative


async def _round(client: AsyncClient, speculation: bool, advance: object) -> Round:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: str) -> GenerationResult:
        async with gate:
            stream = client.stream(
                [Message(role="user", content=prompt)],
                temperature=0.0,
                max_new_tokens=MAX_NEW_TOKENS,
                speculation=speculation,
            )
            async for _ in stream:
                pass
            assert callable(advance)
            advance()
            return stream.result

    started = time.perf_counter()
    results = await asyncio.gather(*(one(prompt) for prompt in PROMPTS))
    return Round(list(results), time.perf_counter() - started)


def _texts(one: Round) -> list[str]:
    return [result.text for result in one.results]


def _figures(plain: list[Round], speculative: list[Round]) -> dict[str, float | int]:
    stats = [result.speculation for one in speculative for result in one.results]
    drafted = sum(s.draft_tokens for s in stats)
    accepted = sum(s.accepted_tokens for s in stats)
    steps = sum(s.spec_steps for s in stats)
    return {
        "prompts": len(PROMPTS),
        "tokens": sum(one.num_tokens for one in (*plain, *speculative)),
        "acceptance_rate": round(accepted / drafted, 4) if drafted else 0.0,
        "mean_acceptance_length": round(1 + accepted / steps, 4) if steps else 1.0,
        "tokens_per_s_plain": round(statistics.median(one.tokens_per_s for one in plain), 2),
        "tokens_per_s_speculative": round(statistics.median(one.tokens_per_s for one in speculative), 2),
    }


def _show_texts(one: Round) -> None:
    for prompt, result in zip(PROMPTS, one.results, strict=True):
        stats = result.speculation
        console.print(f"[bold cyan]{prompt.splitlines()[0][:110]}[/]")
        console.print(result.text.strip(), markup=False, highlight=False)
        console.print(
            f"[dim]{result.usage.completion_tokens} tokens, {stats.accepted_tokens} of {stats.draft_tokens} "
            f"drafted tokens accepted[/]\n"
        )


def _show(figures: dict[str, float | int], metrics: list[str], *, same: bool) -> None:
    console.print("[bold]From /metrics[/]")
    for line in metrics:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    table = Table(title="redraft demo", show_header=False)
    for name, value in figures.items():
        table.add_row(name, str(value))
    table.add_row("ratio", f"{figures['tokens_per_s_speculative'] / figures['tokens_per_s_plain']:.2f}")
    table.add_row("same text with and without speculation", "yes" if same else "NO")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
