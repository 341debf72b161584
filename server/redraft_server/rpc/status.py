"""Every answer of the API that is not OK, as exceptions that carry a gRPC status with google.rpc details.

Servicers raise a `StatusError`; the interceptor sends it. Nothing else in the server calls `context.abort`.
Messages name fields and limits, never the text of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from redraft_server.engine.api import (
    AdmissionError,
    DuplicateRequestId,
    EngineUnavailable,
    QueueFull,
    RequestTooLarge,
)
from redraft_server.security.errors import AccessRefused

ERROR_DOMAIN = "redraft"
UNAVAILABLE_RETRY_S = 1.0

# Details travel in HTTP/2 headers, of which clients take about 8 KiB.
_MAX_VIOLATIONS = 8
_MAX_TEXT = 200

_DETAILS_KEY = "grpc-status-details-bin"
# The C-core client waits as long as this trailer says and ignores RetryInfo; others read RetryInfo.
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field; `field` is its path from the request message, as the caller wrote it."""

    field: str
    description: str


class StatusError(Exception):
    """Ends an RPC with a status other than OK."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        details: Sequence[message.Message] = (),
        *,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.details = tuple(details)

    @property
    def reason(self) -> str:
        """The stable word of its ErrorInfo; empty without one."""
        return next((detail.reason for detail in self.details if isinstance(detail, error_details_pb2.ErrorInfo)), "")

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The trailers that carry the details and, for a refusal to be retried, when to do so."""
        details = list(self.details)
        trailers: list[tuple[str, str | bytes]] = []
        if self.retry_after_s is not None:
            milliseconds = max(1, math.ceil(self.retry_after_s * 1000))
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(milliseconds)
            details.append(retry)
            trailers.append((_PUSHBACK_KEY, str(milliseconds)))
        if details:
            status = status_pb2.Status(code=self.code.value[0], message=self.message, details=map(_pack, details))
            trailers.append((_DETAILS_KEY, status.SerializeToString()))
        return tuple(trailers)


def invalid_argument(violations: Iterable[FieldViolation]) -> StatusError:
    """INVALID_ARGUMENT with one BadRequest violation per field (the first few, if there are very many)."""
    listed = [FieldViolation(v.field[:_MAX_TEXT], v.description[:_MAX_TEXT]) for v in violations]
    shown = listed[:_MAX_VIOLATIONS]
    text = "; ".join(f"{v.field}: {v.description}" for v in shown[:3])
    if len(listed) > 3:
        text += f"; and {len(listed) - 3} more"
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description) for v in shown
        ]
    )
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, text, [detail])


def model_not_found(name: str, served: str) -> StatusError:
    shown = name if len(name) <= 64 else name[:64] + "..."
    return StatusError(
        grpc.StatusCode.NOT_FOUND,
        f"no model {shown!r} here; this server has {served!r}",
        [_error_info("MODEL_NOT_FOUND", {"model": served})],
    )


def draft_not_found(version: str) -> StatusError:
    return StatusError(
        grpc.StatusCode.NOT_FOUND, f"no draft {version[:64]!r} here", [_error_info("DRAFT_NOT_FOUND", {})]
    )


def failed_precondition(kind: str, subject: str, description: str) -> StatusError:
    """The request is well-formed, but this server's set-up rules it out."""
    violation = error_details_pb2.PreconditionFailure.Violation(type=kind, subject=subject, description=description)
    detail = error_details_pb2.PreconditionFailure(violations=[violation])
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"{subject}: {description}", [detail])


def deadline_exceeded(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def cancelled() -> StatusError:
    return StatusError(grpc.StatusCode.CANCELLED, "the request was cancelled")


def internal() -> StatusError:
    """A bug. What went wrong is in the server's log under the request id, and only there."""
    return StatusError(grpc.StatusCode.INTERNAL, "internal error")


def unavailable(reason: str, message: str) -> StatusError:
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, message, [_error_info(reason, {})], retry_after_s=UNAVAILABLE_RETRY_S
    )


def aborted(message: str) -> StatusError:
    """Something else changed first; look again and decide anew."""
    return StatusError(grpc.StatusCode.ABORTED, message)


def unimplemented(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.UNIMPLEMENTED, message)


def from_admission(error: AdmissionError) -> StatusError:
    """How the engine's refusal looks to the caller."""
    match error:
        case QueueFull():
            return StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                str(error),
                [_error_info("QUEUE_FULL", {})],
                retry_after_s=error.retry_after_s,
            )
        case RequestTooLarge():
            return invalid_argument([FieldViolation(in_generation(error.field), str(error))])
        case DuplicateRequestId():
            return StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                "generation.request_id: a request with this id is running",
                [_error_info("DUPLICATE_REQUEST_ID", {})],
            )
        case EngineUnavailable():
            return unavailable(error.reason, str(error))
        case _:
            return internal()


def from_refusal(refusal: AccessRefused) -> StatusError:
    """How it looks to a caller that is not let in."""
    info = _error_info(refusal.reason.upper(), {})
    if refusal.reason in ("missing_key", "unknown_key", "expired_key"):
        return StatusError(grpc.StatusCode.UNAUTHENTICATED, str(refusal), [info])
    if refusal.reason in ("role", "tenant"):
        return StatusError(grpc.StatusCode.PERMISSION_DENIED, str(refusal), [info])
    violation = error_details_pb2.QuotaFailure.Violation(subject=refusal.reason, description=str(refusal))
    quota = error_details_pb2.QuotaFailure(violations=[violation])
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return StatusError(code, str(refusal), [info, quota], retry_after_s=refusal.retry_after_s)


def in_generation(field: str) -> str:
    """The engine's and the parameter classes' name of a field, as the caller of the API knows it."""
    return field if field.startswith("generation.") else f"generation.{field}"


def _error_info(reason: str, metadata: Mapping[str, str]) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=dict(metadata))


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
