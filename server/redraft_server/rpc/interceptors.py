"""Around every RPC of ours: exceptions become statuses, and each call is counted and logged.

Servicers of `redraft.v1` are coroutines (streams use `context.write`), so one wrapper fits all. Health and
reflection pass through untouched: probes would drown the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError, Message

from redraft_server.rpc.status import FieldViolation, StatusError, internal, invalid_argument

_log = logging.getLogger("redraft.rpc")
_request_id: ContextVar[str] = ContextVar("request_id", default="")

_Context = grpc.aio.ServicerContext[Message, Message]
_Behaviour = Callable[[Any, _Context], Awaitable[Any]]


class RpcMetrics(Protocol):
    """The part of `redraft.telemetry.metrics.ServerMetrics` that counts RPCs."""

    def observe_rpc(self, service: str, method: str, code: str, seconds: float) -> None: ...


def note_request_id(request_id: str) -> None:
    """Put the id on the log lines of the current RPC."""
    _request_id.set(request_id)


def code_of(error: BaseException, context: _Context) -> grpc.StatusCode:
    """The status that a client sees when a servicer ends with `error`."""
    if isinstance(error, StatusError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        # grpc cancels the servicer both when the client goes and when its deadline passes.
        remaining = context.time_remaining()
        expired = remaining is not None and remaining <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
    return grpc.StatusCode.INTERNAL


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Maps exceptions, counts and logs; knows whether any RPC is running."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no RPC of ours is running."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not path.startswith("/redraft."):
            return handler
        _, service, method = path.split("/", 2)
        # Requests are decoded inside the wrapper, so that a malformed one is answered like other bad input; grpc
        # itself would call it UNKNOWN. The stubs describe synchronous handlers only, hence the loose types.
        decode, encode = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            stream: Any = self._wrap(service, method, handler.unary_stream, decode)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=encode)
        unary: Any = self._wrap(service, method, handler.unary_unary, decode)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=encode)

    def _wrap(self, service: str, method: str, behaviour: Any, decode: Any) -> _Behaviour:
        async def run(data: bytes, context: _Context) -> Any:
            started = time.monotonic()
            note_request_id("")
            code = grpc.StatusCode.OK
            self._in_flight += 1
            self._idle.clear()
            try:
                return await behaviour(_decoded(data, decode), context)
            except asyncio.CancelledError as error:
                code = code_of(error, context)
                raise
            except Exception as error:
                code = code_of(error, context)
                status = error if isinstance(error, StatusError) else self._bug(service, method)
                await context.abort(status.code, status.message, status.trailing_metadata())
            finally:
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._idle.set()
                seconds = time.monotonic() - started
                self._metrics.observe_rpc(service, method, code.name, seconds)
                _log.info("rpc", extra=self._fields(service, method, code=code.name, seconds=round(seconds, 6)))

        return run

    def _bug(self, service: str, method: str) -> StatusError:
        _log.exception("unexpected error in an rpc", extra=self._fields(service, method))
        return internal()

    def _fields(self, service: str, method: str, **more: object) -> dict[str, object]:
        return {"method": f"{service}/{method}", "request_id": _request_id.get(), **more}


def _decoded(data: bytes, decode: Callable[[bytes], Message]) -> Message:
    try:
        return decode(data)
    except DecodeError:
        description = "is not a valid message of this method; text fields must be UTF-8"
        raise invalid_argument([FieldViolation("request", description)]) from None
