"""The demo's side of the wire: prompts sent through the public client, and what the replies say about the draft."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from redraft_client.aio import AsyncClient
from redraft_client.types import GenerationResult, Message
from scripts.demo_traffic import DemoPrompt

MAX_NEW_TOKENS = 48
CONCURRENCY = 6
"""Of the traffic; measurements are of one stream, as a single user feels it."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of `build/demo.json`: a domain's evaluation prompts, served at temperature 0.

    `alpha` is the expected acceptance of the reached positions; `tokens_per_s_plain` the same prompts without
    speculation, in turns with those with it.
    """

    stage: str
    domain: str
    draft_version: str
    alpha: float
    acceptance_rate: float
    mean_acceptance_length: float
    tokens_per_s: float
    tokens_per_s_plain: float
    same_text: bool

    def to_json(self) -> dict[str, object]:
        return asdict(self)


async def send(
    client: AsyncClient,
    prompts: Sequence[DemoPrompt],
    *,
    speculation: bool = True,
    log: bool = True,
    concurrency: int = CONCURRENCY,
    on_done: Callable[[], None] = lambda: None,
) -> list[GenerationResult]:
    """Stream all prompts, a few at a time; results in their order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: DemoPrompt) -> GenerationResult:
        async with gate:
            stream = client.stream(
                [Message(role="system", content=prompt.system), Message(role="user", content=prompt.text)],
                temperature=0.0,
                max_new_tokens=MAX_NEW_TOKENS,
                speculation=speculation,
                exclude_from_traffic_log=not log,
                domain=prompt.domain,
            )
            async for _ in stream:
                pass
            on_done()
            return stream.result

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def measure(client: AsyncClient, stage: str, version: str, prompts: Sequence[DemoPrompt]) -> Measurement:
    """Serve one domain's evaluation prompts, one at a time, plain and with speculation, twice each in turns; none is
    logged."""
    seconds = {True: 0.0, False: 0.0}
    tokens = {True: 0, False: 0}
    texts: dict[bool, list[str]] = {}
    spoken: list[GenerationResult] = []
    for speculation in (False, True, False, True):
        started = time.perf_counter()
        results = await send(client, prompts, speculation=speculation, log=False, concurrency=1)
        seconds[speculation] += time.perf_counter() - started
        tokens[speculation] += sum(result.usage.completion_tokens for result in results)
        texts[speculation] = [result.text for result in results]
        spoken += results if speculation else []
    stats = [result.speculation for result in spoken]
    drafted, accepted = sum(s.draft_tokens for s in stats), sum(s.accepted_tokens for s in stats)
    steps, positions = sum(s.spec_steps for s in stats), sum(s.expected_acceptance_positions for s in stats)
    return Measurement(
        stage=stage,
        domain=prompts[0].domain,
        draft_version=version,
        alpha=round(sum(s.expected_acceptance_sum for s in stats) / max(positions, 1), 4),
        acceptance_rate=round(accepted / max(drafted, 1), 4),
        mean_acceptance_length=round(1 + accepted / max(steps, 1), 4),
        tokens_per_s=round(tokens[True] / seconds[True], 2),
        tokens_per_s_plain=round(tokens[False] / seconds[False], 2),
        same_text=texts[True] == texts[False],
    )
