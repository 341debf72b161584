"""Around every RPC of ours: who calls is checked, exceptions become statuses, and each call is counted and logged.

Servicers of `redraft.v1` are coroutines (streams use `context.write`), so one wrapper fits all. Health passes through
untouched: probes have no key, and would drown the log. So does reflection, once its caller has been let in.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from redraft.telemetry.logging import log_ids
from redraft.telemetry.tracing import TRACEPARENT, RpcSpan, TraceContext, Tracer, parse_traceparent
from redraft_server.rpc.receive import decoded, method_of, refusing_bad_messages, taking_one_message
from redraft_server.rpc.status import StatusError, from_refusal, internal
from redraft_server.security.access import AccessControl
from redraft_server.security.errors import AccessRefused
from redraft_server.security.keys import ApiKey
from redraft_server.security.limits import Admission

REQUEST_ID_KEY = "x-request-id"
TRACE_ID_KEY = "x-trace-id"
"""Trailing metadata of every reply, refusals included: what to look for in the server's logs and traces."""

_log = logging.getLogger("redraft.rpc")
_current: ContextVar[CurrentRpc] = ContextVar("current_rpc")

_Context = grpc.aio.ServicerContext[Message, Message]
_Behaviour = Callable[[Any, _Context], Awaitable[Any]]


class RpcMetrics(Protocol):
    """The part of `redraft.telemetry.metrics.ServerMetrics` that counts RPCs."""

    def observe_rpc(self, service: str, method: str, code: str, seconds: float) -> None: ...


@dataclass(slots=True)
class CurrentRpc:
    """The RPC that the current task answers. Its ids are on the task's log lines and in the reply's trailers."""

    request_id: str
    span: RpcSpan
    admission: Admission | None = None
    """Of the tenant whose key was sent; None on a server without keys."""

    def __post_init__(self) -> None:
        self.name_request(self.request_id)

    def name_request(self, request_id: str) -> None:
        """Call the RPC by the client's own id from now on."""
        self.request_id = request_id
        log_ids(request_id=request_id, trace_id=self.span.trace_id)

    def trailers(self) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID_KEY, self.request_id), (TRACE_ID_KEY, self.span.trace_id))


def current_rpc() -> CurrentRpc:
    """Raises LookupError outside an RPC of ours."""
    return _current.get()


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
    """Maps exceptions, counts, logs and traces; knows whether any RPC is running.

    With `access`, lets in only who has a key and has not used up what goes with it.
    """

    def __init__(self, metrics: RpcMetrics, tracer: Tracer, access: AccessControl | None = None) -> None:
        self._metrics = metrics
        self._access = access
        self._tracer = tracer
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
        if handler is None:
            return None
        if not path.startswith(("/redraft.", "/grpc.reflection.")):
            return refusing_bad_messages(handler)
        try:
            key = self._identify(handler_call_details)
        except AccessRefused as refusal:
            return self._refuse(path, from_refusal(refusal))
        if not path.startswith("/redraft."):
            return refusing_bad_messages(handler)
        behaviour = _decoding(method_of(handler), handler.request_deserializer)
        return taking_one_message(handler, self._wrap(path, behaviour, key))

    def _identify(self, details: grpc.HandlerCallDetails) -> ApiKey | None:
        if self._access is None:
            return None
        return self._access.identify(details.method, details.invocation_metadata or ())

    def _refuse(self, path: str, status: StatusError) -> grpc.RpcMethodHandler[Any, Any]:
        """As a stream of requests, whatever the method is: such a handler ends the call without reading its message,
        so that callers without a key cannot fill the memory."""

        async def refuse(requests: Any, context: _Context) -> None:
            raise status

        refused: Any = self._wrap(path, refuse, None)
        return grpc.stream_stream_rpc_method_handler(refused)

    def _admitted(self, key: ApiKey | None, path: str) -> AbstractContextManager[Admission | None]:
        return nullcontext() if key is None or self._access is None else self._access.admitted(key, path)

    def _wrap(self, path: str, behaviour: _Behaviour, key: ApiKey | None) -> _Behaviour:
        _, service, method = path.split("/", 2)

        async def run(data: Any, context: _Context) -> Any:
            started = time.monotonic()
            span = self._tracer.start_rpc(service, method, _parent_of(context))
            rpc = CurrentRpc(uuid.uuid4().hex, span)
            _current.set(rpc)
            code, reason = grpc.StatusCode.OK, ""
            self._in_flight += 1
            self._idle.clear()
            try:
                with self._admitted(key, path) as rpc.admission:
                    reply = await behaviour(data, context)
                context.set_trailing_metadata(rpc.trailers())
                return reply
            except asyncio.CancelledError as error:
                code = code_of(error, context)
                raise
            except Exception as error:
                status = self._status_of(error, service, method)
                code, reason = status.code, status.reason
                await context.abort(status.code, status.message, status.trailing_metadata() + rpc.trailers())
            finally:
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._idle.set()
                seconds = time.monotonic() - started
                self._metrics.observe_rpc(service, method, code.name, seconds)
                words = {"method": f"{service}/{method}", "code": code.name, "reason": reason, "tenant": _tenant(key)}
                _log.info("rpc", extra={**{k: v for k, v in words.items() if v}, "seconds": round(seconds, 6)})
                span.end(code.name, {"redraft.request_id": rpc.request_id})

        return run

    def _status_of(self, error: Exception, service: str, method: str) -> StatusError:
        if isinstance(error, StatusError):
            return error
        if isinstance(error, AccessRefused):
            return from_refusal(error)
        _log.exception("unexpected error in an rpc", extra={"method": f"{service}/{method}"})
        return internal()


def _tenant(key: ApiKey | None) -> str:
    return "" if key is None else key.tenant


def _parent_of(context: _Context) -> TraceContext | None:
    metadata = context.invocation_metadata() or ()
    return parse_traceparent([str(value) for key, value in metadata if key == TRACEPARENT])


def _decoding(behaviour: Any, decode: Any) -> _Behaviour:
    """The servicer's method on bytes. Decoding is its first step, so that a malformed message is answered, counted and
    logged like other bad input."""

    async def decode_and_run(data: bytes | None, context: _Context) -> Any:
        return await behaviour(decoded(data, decode), context)

    return decode_and_run
