"""Callers that break the rules of gRPC or of sense, each alone. tests/ops/test_hostile.py sends thousands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from redraft.v1 import generation_pb2 as pb
from redraft.v1 import tokenizer_pb2
from redraft_server.rpc import receive
from redraft_server.rpc.convert import PROMPT_PER_POSITION
from tests.edge import Edge, fields_of, limited, running_edge

GENERATE = "/redraft.v1.GenerationService/Generate"
STREAM = "/redraft.v1.GenerationService/StreamGenerate"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def bytes_to(edge: Edge, path: str, *messages: bytes) -> Any:
    """A call that sends these messages and ends its side, whatever the method expects."""

    async def requests() -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    return edge.channel.stream_stream(path)(requests(), timeout=60)


@pytest.mark.parametrize("path", [GENERATE, STREAM, HEALTH])
async def test_a_call_that_ends_without_a_message_is_answered(path: str) -> None:
    async with running_edge() as edge:
        error = await refused(bytes_to(edge, path))
        assert (error.code(), fields_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, ["request"])
        await edge.assert_serves()


@pytest.mark.parametrize("path", [GENERATE, STREAM, HEALTH, REFLECTION])
async def test_a_message_that_is_none_is_the_callers_fault(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running_edge() as edge:
        error = await refused(bytes_to(edge, path, b"\xff\xff\xff"))
        assert (error.code(), fields_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, ["request"])
        await edge.assert_serves()
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_message_after_the_first_is_not_read() -> None:
    async with running_edge() as edge:
        message = pb.GenerateRequest(generation=limited(2)).SerializeToString()
        replies = [pb.GenerateResponse.FromString(data) async for data in bytes_to(edge, GENERATE, message, b"\xff")]
        assert [reply.choices[0].text for reply in replies] == ["ab"]


async def test_a_message_that_does_not_come_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "MESSAGE_TIMEOUT_S", 0.01)
    async with running_edge() as edge:
        call = edge.channel.stream_stream(GENERATE)(timeout=60)
        error = await refused(call)
        assert (error.code(), fields_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, ["request"])
        await edge.assert_serves()


async def test_a_call_without_a_message_does_not_hold_up_a_drain() -> None:
    async with running_edge() as edge:
        silent = edge.channel.stream_stream(GENERATE)(timeout=600)
        await edge.assert_serves()  # on the same connection, after it
        await asyncio.wait_for(edge.app.drain(), 30)
        assert (await refused(silent)).code() is grpc.StatusCode.UNAVAILABLE


async def test_reflection_survives_a_bad_message() -> None:
    async with running_edge() as edge:
        await refused(bytes_to(edge, REFLECTION, b"\xff"))
        request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        replies = [data async for data in bytes_to(edge, REFLECTION, request)]
        assert b"redraft.v1.GenerationService" in replies[0]


@pytest.mark.parametrize(
    ("field", "prompt"),
    [
        ("generation.text", lambda most: pb.Generation(text="a" * (most + 1))),
        ("generation.token_ids.ids", lambda most: pb.Generation(token_ids=pb.TokenIds(ids=[1] * (most + 1)))),
        (
            "generation.chat",
            lambda most: pb.Generation(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a" * most)])),
        ),
    ],
)
async def test_a_prompt_beyond_all_measure_is_refused_unread(field: str, prompt: Any) -> None:
    """Also with truncate_prompt_tokens, for which all of it would have to be tokenized."""
    async with running_edge() as edge:
        generation = prompt(PROMPT_PER_POSITION * edge.engine.info.context_length)
        generation.output.truncate_prompt_tokens = 1
        error = await refused(edge.stream(generation))
        assert (error.code(), fields_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_so_is_a_text_to_be_counted_and_a_list_to_be_spelled_out() -> None:
    async with running_edge() as edge:
        most = PROMPT_PER_POSITION * edge.engine.info.context_length
        text = tokenizer_pb2.TokenizerInput(text="a" * (most + 1))
        count = tokenizer_pb2.CountTokensRequest(input=text).SerializeToString()
        error = await refused(bytes_to(edge, "/redraft.v1.TokenizerService/CountTokens", count))
        assert fields_of(error) == ["input.text"]
        spell = tokenizer_pb2.DetokenizeRequest(token_ids=[1] * (most + 1)).SerializeToString()
        error = await refused(bytes_to(edge, "/redraft.v1.TokenizerService/Detokenize", spell))
        assert fields_of(error) == ["token_ids"]
