"""One admitted generation: from `EngineClient.submit` until both the RPC and the engine are done with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from redraft.telemetry.observations import RequestObservation
from redraft.telemetry.tracing import RpcSpan
from redraft_server.engine.api import ChoiceDelta, EngineClient, EngineRequest, FinishReason, RequestFinished
from redraft_server.rpc.mailbox import Mailbox, MailboxClosed
from redraft_server.rpc.phases import add_phases
from redraft_server.rpc.status import StatusError, cancelled, deadline_exceeded, internal
from redraft_server.security.limits import Admission


class RequestMetrics(Protocol):
    """The part of `redraft.telemetry.metrics.ServerMetrics` that counts requests."""

    def observe_request_finished(self, request: RequestObservation) -> None: ...


@dataclass(slots=True)
class RequestReport:
    """Counts and traces one request exactly once, when its RPC has a status and the engine (if it took it) has let
    go."""

    method: str
    metrics: RequestMetrics
    span: RpcSpan
    admission: Admission | None = None
    """Pays for the tokens, however the request ends."""
    started: float = field(default_factory=time.monotonic)
    num_samples: int = 1
    admitted_ns: int | None = None  # Unix time; None: the engine has not taken it
    finish_reason: str = ""
    finished: RequestFinished | None = None
    code: grpc.StatusCode | None = None

    def note_admitted(self, num_samples: int) -> None:
        """The engine has taken the request just now."""
        self.num_samples = num_samples
        self.admitted_ns = time.time_ns()

    def note_finish(self, reason: FinishReason) -> None:
        """A choice has ended; the first one's reason stands for the request."""
        self.finish_reason = self.finish_reason or reason.value

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code
        self._emit_if_complete()

    def set_finished(self, finished: RequestFinished) -> None:
        self.finished = finished
        if self.admission is not None:
            self.admission.pay(finished.prompt_tokens + finished.completion_tokens)
        self._emit_if_complete()

    def _emit_if_complete(self) -> None:
        if self.code is None or (self.admitted_ns is not None and self.finished is None):
            return
        end = self.finished
        if end is not None and self.admitted_ns is not None:
            add_phases(self.span, self.admitted_ns, end, self.finish_reason)
        generated = end is not None and end.completion_tokens > 0
        self.metrics.observe_request_finished(
            RequestObservation(
                method=self.method,
                code=self.code.name,
                finish_reason=self.finish_reason,
                duration_seconds=time.monotonic() - self.started,
                queue_seconds=end.queue_s if end is not None else None,
                prefill_seconds=end.prefill_s if end is not None and generated else None,
                time_to_first_token_seconds=end.time_to_first_token_s if end is not None else None,
                decode_seconds=end.decode_s if end is not None and generated else None,
                prompt_tokens=end.prompt_tokens if end is not None else 0,
                cached_prompt_tokens=end.cached_prompt_tokens if end is not None else 0,
                generation_tokens=end.completion_tokens if end is not None else 0,
                num_samples=self.num_samples,
            )
        )


class GenerationCall:
    """An admitted request. `close` must be called; it cancels what the engine has not finished.

    `client_deadline` tells whose deadline the request has. At the client's own, the client sees
    DEADLINE_EXCEEDED; at the server's cap (`limits.request_timeout_s`) it gets the text so far with
    FINISH_REASON_DEADLINE.
    """

    def __init__(
        self,
        engine: EngineClient,
        request: EngineRequest,
        mailbox: Mailbox,
        report: RequestReport,
        *,
        client_deadline: bool,
    ) -> None:
        self.request = request
        self._engine = engine
        self._mailbox = mailbox
        self._report = report
        self._client_deadline = client_deadline

    async def take(self) -> list[ChoiceDelta] | RequestFinished:
        """What came next. Raises `StatusError` if the request ended in a way that has no message."""
        try:
            part = await self._mailbox.take()
        except MailboxClosed:
            raise deadline_exceeded("the stream was not read in time") from None
        if isinstance(part, RequestFinished):
            if part.error is not None:
                raise internal()
            return part
        for delta in part:
            if delta.finish_reason is not None:
                self._check_finish(delta.finish_reason)
                self._report.note_finish(delta.finish_reason)
        return part

    def close(self) -> None:
        """The RPC is over, however it went; or its time is, and unread messages are dropped. Idempotent."""
        if not self._mailbox.is_finished:
            reason = FinishReason.DEADLINE if self.seconds_left() <= 0 else FinishReason.CANCELLED
            self._report.note_finish(reason)
            self._engine.cancel(self.request.request_id, reason)
        elif (unread := self._mailbox.unread_finish) is not None:
            # the client went, or its deadline came, while the end lay here
            self._report.note_finish(unread)
        self._mailbox.close()

    def seconds_left(self) -> float:
        """Time until the request's deadline; negative when it is past."""
        assert self.request.deadline is not None, "the edge gives every request a deadline"
        return self.request.deadline - time.monotonic()

    def _check_finish(self, reason: FinishReason) -> None:
        error: StatusError | None = None
        if reason is FinishReason.ERROR:
            error = internal()
        elif reason is FinishReason.CANCELLED:
            error = cancelled()
        elif reason is FinishReason.DEADLINE and self._client_deadline:
            error = deadline_exceeded("the deadline passed before the completion was finished")
        if error is not None:
            self._report.finish_reason = reason.value
            raise error
