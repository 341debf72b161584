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
from tests.replica_load import BETWEEN, RUNNING, answers_of, load_while_it_leaves, replica_flags

STREAMS, NEW_TOKENS = 32, 100


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return replica_flags(tmp_path_factory.mktemp("replicas"))


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
            answered = await load_while_it_leaves(client, leaving)
        served = [answers_of(leaving), answers_of(staying)]
        outputs = leaving.output() + staying.output()
    assert min(served) >= BETWEEN // 3, "both took part"
    assert sum(served) >= answered
    assert "Traceback" not in outputs
