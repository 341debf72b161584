"""The request messages of a call, read and decoded here rather than by grpc.

grpc decodes before it calls a handler, and answers two kinds of bad caller badly (seen with 1.85): a message that is no
such message ends the call as UNKNOWN, with a stack trace in the log; and one who ends its side without having sent a
message is never answered at all. So every method is registered as one that takes a stream of bytes, which on the wire
is the same thing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from redraft_server.rpc.status import FieldViolation, StatusError, invalid_argument

MESSAGE_TIMEOUT_S = 60.0
"""Longest wait for the message of a call that has begun, so that calls without one do not pile up."""

Context = grpc.aio.ServicerContext[Message, Message]
Decode = Callable[[bytes], Message]
Behaviour = Callable[[Any, Context], Awaitable[Any]]


def method_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    """What the servicer registered, for methods with one request. The stubs know synchronous handlers only."""
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


def taking_one_message(handler: grpc.RpcMethodHandler[Any, Any], run: Behaviour) -> grpc.RpcMethodHandler[Any, Any]:
    """In place of `handler`, call `run` with the message's bytes, or with None if no message came.

    `run` returns the reply, or writes it in pieces if the method streams.
    """

    async def handle(requests: Any, context: Context) -> None:
        reply = await run(await _receive(context), context)
        if not handler.response_streaming:
            await context.write(reply)

    return _of_bytes(handler, handle)


def refusing_bad_messages(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler`, for a service that is not ours, with INVALID_ARGUMENT for what cannot be decoded."""
    decode = handler.request_deserializer

    async def one(requests: Any, context: Context) -> None:
        message = decoded(await _receive(context), decode)
        reply = await method_of(handler)(message, context)
        if not handler.response_streaming:
            await context.write(reply)

    async def many(requests: AsyncIterator[bytes], context: Context) -> None:
        messages = (decoded(data, decode) async for data in requests)
        replies: Any = handler.stream_stream
        async for reply in replies(messages, context):
            await context.write(reply)

    async def handle(requests: Any, context: Context) -> None:
        try:
            await (many if handler.request_streaming else one)(requests, context)
        except StatusError as error:
            await context.abort(error.code, error.message, error.trailing_metadata())

    return _of_bytes(handler, handle)


def decoded(data: bytes | None, decode: Any) -> Message:
    """The message. Raises `StatusError` INVALID_ARGUMENT."""
    if data is None:
        raise invalid_argument([FieldViolation("request", "is missing: the call ended or waited without a message")])
    try:
        message: Message = decode(data)
    except DecodeError:
        description = "is not a valid message of this method; text fields must be UTF-8"
        raise invalid_argument([FieldViolation("request", description)]) from None
    return message


async def _receive(context: Context) -> bytes | None:
    """The call's first message, undecoded; further ones are not read. None: it has none, or took too long."""
    read: Any = context.read
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT_S):
            data = await read()
    except TimeoutError:
        return None
    return None if data is grpc.aio.EOF else bytes(data)


def _of_bytes(handler: grpc.RpcMethodHandler[Any, Any], behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.stream_stream_rpc_method_handler(behaviour, response_serializer=handler.response_serializer)
