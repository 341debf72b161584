"""Small replicas, and callers at work while one of them leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path

from redraft_client.aio import AsyncClient
from scripts.server_process import ServerProcess
from tests.fakes import save_tiny

RUNNING = 8
"""Requests that a replica has in progress at once."""
CLIENTS, BETWEEN = 6, 18
"""Callers at work while a replica leaves, and the answers awaited before and after."""


def replica_flags(folder: Path) -> list[str]:
    """Of a server on a tiny model, made in `folder`."""
    engine = ["--engine.kv_cache_tokens", "8192", "--engine.max_running_requests", str(RUNNING)]
    model = save_tiny(folder / "tiny")
    return ["--model.target", str(model), "--model.threads", "1", "--drain.grace_s", "300", *engine]


def answers_of(server: ServerProcess) -> int:
    """Calls that it has answered so far."""
    return server.output().count("rpc code=OK method=redraft.v1.GenerationService")


async def load_while_it_leaves(client: AsyncClient, leaving: ServerProcess) -> int:
    """Send SIGTERM to `leaving` under load and go on until well after it has ended, as it should.

    Returns the number of answers. Raises whatever any caller met with.
    """
    load = Load(client)
    await load.answers(BETWEEN)
    ended = asyncio.create_task(asyncio.to_thread(leaving.terminate))
    while not ended.done():
        await load.answers(1)
    await load.answers(BETWEEN)
    await load.stop()
    assert await ended == 0
    return load.answered


class Load:
    """Callers that always have a request on its way, and raise whatever goes wrong with it."""

    def __init__(self, client: AsyncClient) -> None:
        self.answered = 0
        self._client = client
        self._more = asyncio.Condition()
        self._stopping = False
        self._callers = [asyncio.create_task(self._call(number)) for number in range(CLIENTS)]

    async def answers(self, count: int) -> None:
        """Wait for so many more."""
        target = self.answered + count
        async with self._more:
            await self._more.wait_for(lambda: self.answered >= target or any(c.done() for c in self._callers))
        for caller in self._callers:
            if caller.done():
                caller.result()

    async def stop(self) -> None:
        """Let each caller have its last answer."""
        self._stopping = True
        await asyncio.gather(*self._callers)

    async def _call(self, number: int) -> None:
        try:
            while not self._stopping:
                await self._ask(stream=number % 2 == 0)
                self.answered += 1
                async with self._more:
                    self._more.notify_all()
        finally:
            async with self._more:
                self._more.notify_all()

    async def _ask(self, *, stream: bool) -> None:
        if not stream:
            result = await self._client.generate("a question", max_new_tokens=20, ignore_eos=True)
            assert result.usage.completion_tokens == 20
            return
        running = self._client.stream("a story", max_new_tokens=40, ignore_eos=True)
        async for _ in running:
            pass
        assert running.result.usage.completion_tokens == 40
