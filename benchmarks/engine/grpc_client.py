"""A process that streams from a server over gRPC, so that what a client costs is not on the server's account."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks.peers.workers.protocol import Generated, Request, run
from redraft_client.aio import AsyncClient


@dataclass(frozen=True, slots=True)
class Target:
    """`address`: host:port of the server."""

    address: str


class StreamingClient:
    """Every prompt is a stream of its own, none ends before its most new tokens."""

    version = "redraft client"

    def __init__(self, target: Target) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect(target.address))

    def generate(self, request: Request) -> Generated:
        return Generated(self._runner.run(self._stream_all(request)))

    def close(self) -> None:
        """Nothing outlives this process."""

    async def _connect(self, address: str) -> AsyncClient:
        return AsyncClient(address, timeout=None)

    async def _stream_all(self, request: Request) -> list[list[int]]:
        return await asyncio.gather(*(self._stream(prompt, request) for prompt in request.prompts))

    async def _stream(self, prompt: list[int], request: Request) -> list[int]:
        async with self._client.stream(
            prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            ignore_eos=True,
            token_ids=True,
        ) as chunks:
            return [token for chunk in [one async for one in chunks] for d in chunk.deltas for token in d.token_ids]


if __name__ == "__main__":
    run(StreamingClient, Target)
