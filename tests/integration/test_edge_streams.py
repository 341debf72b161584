"""Streams that end in another way than by themselves: cancelled, late, unread, failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest

from redraft.v1 import generation_pb2 as pb
from redraft_server.config import LimitsConfig
from redraft_server.engine.api import FinishReason
from redraft_server.rpc import generation
from redraft_server.rpc.call import GenerationCall
from tests.edge import Edge, edge_config, limited, running_edge
from tests.fake_engine import FakeEngine, letter

Code = grpc.StatusCode


async def engine_reaches(edge: Edge, condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(edge.engine.wait_for, condition)


async def read_to_end(edge: Edge, stream: bool, generation: pb.Generation, timeout: float | None = None) -> None:
    """One request, by either method."""
    if stream:
        async for reply in edge.stream(generation, timeout=timeout):
            assert reply.request_id
    else:
        await edge.generate(generation, timeout=timeout)


async def test_a_cancelled_stream_frees_the_engine() -> None:
    async with running_edge() as edge:
        edge.engine.gate.clear()
        call = edge.stream(limited(1000, request_id="r1"))
        await call.initial_metadata()
        call.cancel()
        await engine_reaches(edge, lambda: "r1" in edge.engine.ended)
        assert edge.engine.ended["r1"] is FinishReason.CANCELLED
        edge.engine.gate.set()
        await edge.assert_serves()
        labels = {"model": "fake", "method": "StreamGenerate", "code": "CANCELLED"}
        assert edge.metric("redraft_requests_total", finish_reason="cancelled", **labels) == 1


async def test_a_cancelled_unary_call_frees_the_engine() -> None:
    async with running_edge() as edge:
        edge.engine.gate.clear()
        call = edge.generation.Generate(pb.GenerateRequest(generation=limited(1000, request_id="r1")))
        await engine_reaches(edge, lambda: bool(edge.engine.requests))
        call.cancel()
        await engine_reaches(edge, lambda: edge.engine.ended.get("r1") is FinishReason.CANCELLED)
        edge.engine.gate.set()
        await edge.assert_serves()


async def test_a_client_that_vanishes_frees_the_engine_and_no_other_stream_notices() -> None:
    engine = FakeEngine()
    async with running_edge(engine) as edge:
        engine.gate.clear()
        other = edge.stream(limited(30, request_id="other"))
        await other.initial_metadata()
        async with grpc.aio.insecure_channel(edge.app.address) as channel:
            stub = edge.generation.__class__(channel)
            call = stub.StreamGenerate(pb.StreamGenerateRequest(generation=limited(4000, request_id="gone")))
            await call.initial_metadata()
            # The channel closes under the call.
        await engine_reaches(edge, lambda: engine.ended.get("gone") is FinishReason.CANCELLED)
        engine.gate.set()
        text = "".join([delta.text async for reply in other for delta in reply.deltas])
        assert text == "".join(letter(i)[1] for i in range(30))
        assert engine.num_unfinished() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_deadline(stream: bool) -> None:
    async with running_edge() as edge:
        edge.engine.gate.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(edge, stream, limited(9, request_id="late"), timeout=0.2)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await engine_reaches(edge, lambda: "late" in edge.engine.ended)
        assert edge.engine.ended["late"] is FinishReason.DEADLINE
        edge.engine.gate.set()
        await edge.assert_serves()


async def test_a_deadline_already_past() -> None:
    async with running_edge() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(limited(9), timeout=-1)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        await edge.assert_serves()


async def test_a_deadline_that_the_queue_will_miss_is_refused_at_once() -> None:
    async with running_edge(FakeEngine(queue_delay_s=100.0)) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(limited(9), timeout=50)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert "queue" in (caught.value.details() or "")
        assert edge.engine.requests == []
        await edge.assert_serves()  # without a deadline it may wait


async def test_at_the_servers_own_cap_the_text_so_far_is_delivered() -> None:
    config = edge_config(limits=LimitsConfig(request_timeout_s=0.2))
    async with running_edge(config=config) as edge:
        edge.engine.gate.clear()
        reply = await edge.generate(limited(9))
        assert reply.choices[0].finish_reason == pb.FINISH_REASON_DEADLINE
        replies = [reply async for reply in edge.stream(limited(9), timeout=60)]
        assert replies[0].deltas[0].finish_reason == pb.FINISH_REASON_DEADLINE
        assert replies[-1].HasField("completion")


async def test_a_client_that_never_reads_does_not_hold_up_the_engine() -> None:
    """32 MB for a reader that sleeps: more than gRPC buffers, so the rest is merged in the mailbox."""
    chunk = "x" * 8192
    engine = FakeEngine(emit=lambda position: (1, chunk), tokens_per_step=2)
    async with running_edge(engine) as edge:
        slow = edge.stream(limited(4000, request_id="slow"))
        await slow.initial_metadata()
        await engine_reaches(edge, lambda: engine.ended.get("slow") is FinishReason.LENGTH)
        assert engine.emitted_chars == 4000 * len(chunk)
        engine.emit = letter
        await edge.assert_serves()
        messages, chars = 0, 0
        async for reply in slow:
            assert reply.ByteSize() < 4 * 2**20
            messages += 1
            chars += sum(len(delta.text) for delta in reply.deltas)
        assert chars == 4000 * len(chunk)
        assert messages < 2000 / 2


async def test_what_a_client_does_not_read_in_time_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has long finished and forgotten the request; only unread messages are left."""
    dropped = asyncio.Event()
    close = GenerationCall.close

    def close_and_tell(call: GenerationCall) -> None:
        close(call)
        dropped.set()

    monkeypatch.setattr(GenerationCall, "close", close_and_tell)
    monkeypatch.setattr(generation, "UNREAD_GRACE_S", 0.0)
    engine = FakeEngine(emit=lambda position: (1, "x" * 8192), tokens_per_step=16)
    config = edge_config(limits=LimitsConfig(request_timeout_s=1.0))
    async with running_edge(engine, config) as edge:
        slow = edge.stream(limited(4000, request_id="slow"))
        await slow.initial_metadata()
        await dropped.wait()
        assert engine.ended == {"slow": FinishReason.LENGTH}
        chars = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - what came before the error counts
            async for reply in slow:
                chars += sum(len(delta.text) for delta in reply.deltas)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert "not read in time" in (caught.value.details() or "")
        assert chars < 4000 * 8192
        engine.emit = letter
        await edge.assert_serves()


async def test_a_slow_reader_that_gives_up_is_cleaned_up() -> None:
    engine = FakeEngine(emit=lambda position: (1, "x" * 8192))
    async with running_edge(engine) as edge:
        slow = edge.stream(limited(4000, request_id="slow"))
        await slow.initial_metadata()
        await engine_reaches(edge, lambda: engine.ended.get("slow") is FinishReason.LENGTH)
        slow.cancel()
        engine.emit = letter
        await edge.assert_serves()
        assert engine.num_unfinished() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_the_engine_is_internal_and_says_nothing(stream: bool) -> None:
    async with running_edge(FakeEngine(fail_at=3)) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_to_end(edge, stream, limited(9))
        assert caught.value.code() is Code.INTERNAL
        assert caught.value.details() == "internal error"
        edge.engine.fail_at = None
        await edge.assert_serves()


async def test_many_streams_end_with_their_own_text() -> None:
    async with running_edge(FakeEngine(tokens_per_step=3)) as edge:

        async def read(count: int) -> str:
            return "".join([d.text async for reply in edge.stream(limited(count)) for d in reply.deltas])

        counts = list(range(1, 65))
        texts = await asyncio.gather(*map(read, counts))
        assert texts == ["".join(letter(i)[1] for i in range(count)) for count in counts]
