"""GenerationService: validate, admit, then deliver what the engine emits.

A request is checked and admitted before any metadata leaves the server, because a client may only retry a call
that has not begun to answer.
"""

# ruff: noqa: N802 - the methods are named by the proto

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from google.protobuf.message import Message

from redraft.v1 import generation_pb2 as pb
from redraft.v1 import generation_pb2_grpc
from redraft_server.config import LimitsConfig, TrafficLogConfig
from redraft_server.engine.api import AdmissionError, ChoiceDelta, EngineClient, RequestFinished
from redraft_server.rpc import convert
from redraft_server.rpc.call import GenerationCall, RequestMetrics, RequestReport
from redraft_server.rpc.convert_reply import ReplyBuilder
from redraft_server.rpc.interceptors import REQUEST_ID_KEY, CurrentRpc, code_of, current_rpc
from redraft_server.rpc.mailbox import Mailbox, join_by_choice
from redraft_server.rpc.status import FieldViolation, deadline_exceeded, from_admission, invalid_argument
from redraft_server.rpc.text import TextService
from redraft_server.security.access import TENANT_KEY

# The engine keeps deadlines by itself. This much later, what a client has not read is dropped, so that one that
# never reads cannot hold its completion in memory for ever. (grpc cannot end a call under a blocked write: the
# status follows when the client reads on.)
UNREAD_GRACE_S = 30.0

_Context = grpc.aio.ServicerContext[Message, Message]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(
        self,
        engine: EngineClient,
        text: TextService,
        limits: LimitsConfig,
        traffic_log: TrafficLogConfig,
        metrics: RequestMetrics,
    ) -> None:
        self._engine = engine
        self._text = text
        self._limits = limits
        self._traffic_log = traffic_log
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> pb.GenerateResponse:
        _require_generation(request)
        async with self._admitted("Generate", request.generation, context) as (call, reply):
            deltas: list[ChoiceDelta] = []
            while not isinstance(part := await call.take(), RequestFinished):
                deltas += part
            return reply.unary(join_by_choice(deltas), part)

    # With `context.write` instead of as a generator (which is all that the stubs know), so that a client that
    # goes away raises here, inside `_admitted`, at once.
    async def StreamGenerate(  # type: ignore[override]
        self, request: pb.StreamGenerateRequest, context: _Context
    ) -> None:
        _require_generation(request)
        async with self._admitted("StreamGenerate", request.generation, context) as (call, reply):
            while not isinstance(part := await call.take(), RequestFinished):
                await context.write(reply.deltas(part))
            await context.write(reply.last(part))

    @asynccontextmanager
    async def _admitted(
        self, method: str, generation: pb.Generation, context: _Context
    ) -> AsyncIterator[tuple[GenerationCall, ReplyBuilder]]:
        report = RequestReport(method, self._metrics, current_rpc().span, current_rpc().admission)
        try:
            call, reply = await self._admit(generation, context, report)
            loop = asyncio.get_running_loop()
            last_call = loop.call_later(call.seconds_left() + UNREAD_GRACE_S, call.close)
            try:
                await context.send_initial_metadata(((REQUEST_ID_KEY, call.request.request_id),))
                yield call, reply
            finally:
                last_call.cancel()
                call.close()
        except BaseException as error:
            report.set_code(code_of(error, context))
            raise
        report.set_code(grpc.StatusCode.OK)

    async def _admit(
        self, generation: pb.Generation, context: _Context, report: RequestReport
    ) -> tuple[GenerationCall, ReplyBuilder]:
        info = self._engine.info
        rpc = current_rpc()
        if convert.is_request_id(generation.request_id):
            rpc.name_request(generation.request_id)
        parsed = convert.parse_generation(generation, info, self._limits, own_id=rpc.request_id)
        tenant = _tenant_of(rpc, context)
        deadline, client_deadline = self._deadline(context)
        token_ids = await self._text.encode(parsed.prompt)
        request = convert.to_engine_request(
            parsed,
            token_ids,
            info,
            self._limits,
            deadline=deadline,
            tenant=tenant,
            may_log=self._traffic_log.covers(tenant),
        )
        self._refuse_if_too_late(deadline, client_deadline)
        mailbox = Mailbox(asyncio.get_running_loop(), report.set_finished)
        try:
            self._engine.submit(request, mailbox.sink)
        except AdmissionError as error:
            raise from_admission(error) from None
        report.note_admitted(request.n)
        call = GenerationCall(self._engine, request, mailbox, report, client_deadline=client_deadline)
        reply = ReplyBuilder(info, request, wants_token_ids=parsed.wants_token_ids, token_text=self._text.token_text)
        return call, reply

    def _deadline(self, context: _Context) -> tuple[float, bool]:
        """The request's end in `time.monotonic` seconds, and whether it is the client's rather than our cap."""
        remaining = context.time_remaining()
        cap = self._limits.request_timeout_s
        if remaining is None or remaining > cap:
            return time.monotonic() + cap, False
        return time.monotonic() + remaining, True

    def _refuse_if_too_late(self, deadline: float, client_deadline: bool) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise deadline_exceeded("the deadline passed before the request was admitted")
        delay = self._engine.estimated_queue_delay_s()
        if client_deadline and remaining < delay:
            raise deadline_exceeded(f"the deadline is in {remaining:.2f} s, but the queue takes about {delay:.2f} s")


def _tenant_of(rpc: CurrentRpc, context: _Context) -> str:
    """That of the API key; on a server without keys, what the client says it is."""
    if rpc.admission is not None:
        return rpc.admission.tenant
    metadata = context.invocation_metadata() or ()
    return convert.parse_tenant(value for key, value in metadata if key == TENANT_KEY)


def _require_generation(request: pb.GenerateRequest | pb.StreamGenerateRequest) -> None:
    if not request.HasField("generation"):
        raise invalid_argument([FieldViolation("generation", "is required")])
