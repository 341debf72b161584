"""SIGTERM with streams in flight: they run to their end, new ones are refused, and the process ends with 0."""

from __future__ import annotations

import asyncio

import pytest

from redraft_client.aio import AsyncClient
from redraft_client.errors import UnavailableError
from redraft_client.types import FinishReason, GenerationResult, Message
from scripts.server_process import ServerProcess

pytestmark = pytest.mark.model

STREAMS, NEW_TOKENS = 4, 64


async def is_serving(client: AsyncClient) -> bool:
    try:
        return await client.is_serving("redraft.v1.GenerationService")
    except UnavailableError:
        return False  # takes no calls at all any more


async def drain_under_load(server: ServerProcess) -> tuple[list[GenerationResult], int]:
    """The streams' results and the server's exit status."""
    async with AsyncClient(server.address) as client:
        started = [asyncio.Event() for _ in range(STREAMS)]

        async def one(index: int) -> GenerationResult:
            question = [Message("user", f"Write a story about {index + 2} dragons.")]
            stream = client.stream(question, seed=index, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            async for _ in stream:
                started[index].set()
            return stream.result

        running = [asyncio.create_task(one(index)) for index in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in started))
        assert not any(task.done() for task in running)
        ended = asyncio.create_task(asyncio.to_thread(server.terminate))
        async with asyncio.timeout(60):
            while await is_serving(client):
                pass
        with pytest.raises(UnavailableError):
            await client.generate("too late", max_new_tokens=1, timeout=60)
        return [await task for task in running], await ended


async def test_sigterm_lets_streams_finish(server_flags: list[str]) -> None:
    with ServerProcess(server_flags) as server:
        results, status = await drain_under_load(server)
        output = server.output()
    assert status == 0, output
    for result in results:
        assert result.choices[0].finish_reason is FinishReason.LENGTH
        assert result.usage.completion_tokens == NEW_TOKENS
    assert "draining" in output
    assert "Traceback" not in output
