"""Replicas on a tiny model: one drains under many streams, and one leaves its peer without any client noticing."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc.aio
import pytest

from redraft.v1 import generation_pb2 as pb
from redraft.v1 import generation_pb2_grpc
from redraft_client.aio import AsyncClient
from scripts.server_process import ServerProcess
from tests.fakes import save_tiny

STREAMS, RUNNING, NEW_TOKENS = 32, 8, 100
CLIENTS, BETWEEN = 6, 18
"""Callers at work while a replica leaves, and the answers awaited before and after."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = save_tiny(tmp_path_factory.mktemp("replicas") / "tiny")
    engine = ["--engine.kv_cache_tokens", "8192", "--engine.max_running_requests", str(RUNNING)]
    return ["--model.target", str(model), "--model.threads", "1", "--drain.grace_s", "300", *engine]


async def test_sigterm_under_many_streams_completes_all_of_them(flags: list[str]) -> None:
    """Most of them wait in the queue: those too were taken, and are owed their answer."""
    with ServerProcess(flags, start_timeout_s=600.0, stop_timeout_s=400.0) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            stopping = pb.StoppingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
            calls = [
                stub.StreamGenerate(
                    pb.StreamGenerateRequest(generation=pb.Generation(text=f"story {n}", stopping=stopping))
                )
                for n in range(STREAMS)
            ]
            await asyncio.gather(*(call.initial_metadata() for call in calls))  # sent when a request is admitted
            ended = asyncio.create_task(asyncio.to_thread(server.terminate))
            replies = await asyncio.gather(*(read_all(call) for call in calls))
            status = await ended
        output = server.output()
    assert status == 0, output
    assert [reply.completion.usage.completion_tokens for reply in replies] == [NEW_TOKENS] * STREAMS
    draining = re.search(r"draining count=(\d+)", output)
    assert draining is not None, output
    assert int(draining[1]) >= STREAMS - RUNNING
    assert "unfinished" not in output


async def read_all(call: Any) -> pb.StreamGenerateResponse:
    """The last message, the only one with a completion. Raises if the stream ends with an error."""
    async for reply in call:
        last: pb.StreamGenerateResponse = reply
    assert last.HasField("completion")
    return last


async def test_a_replica_leaves_its_peer_and_no_client_notices(flags: list[str]) -> None:
    """Calls take turns over both; while one drains, and after it has gone, the other has them all."""
    with (
        ServerProcess(flags, start_timeout_s=600.0, stop_timeout_s=400.0) as leaving,
        ServerProcess(flags, start_timeout_s=600.0) as staying,
    ):
        async with AsyncClient(f"ipv4:{leaving.address},{staying.address}", timeout=300.0) as client:
            load = Load(client)
            await load.answers(BETWEEN)
            ended = asyncio.create_task(asyncio.to_thread(leaving.terminate))
            while not ended.done():
                await load.answers(1)
            await load.answers(BETWEEN)
            await load.stop()
            assert await ended == 0
        served = [
            server.output().count("rpc code=OK method=redraft.v1.GenerationService") for server in (leaving, staying)
        ]
        outputs = leaving.output() + staying.output()
    assert min(served) >= BETWEEN // 3, "both took part"
    assert sum(served) >= load.answered
    assert "Traceback" not in outputs


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
