"""The error tree. Every failed call raises one of these; catch the base class to catch all.

    RedraftClientError
    ├── InvalidArgumentError       a parameter is wrong; `field_violations` names the fields
    ├── NotFoundError              no such model or draft
    ├── FailedPreconditionError    the server's state forbids it; `violations` says what
    ├── AlreadyExistsError         a request with this request_id is running
    ├── AbortedError               lost a race with another change; read the state again and decide
    ├── ResourceExhaustedError     queue or memory full, or the tenant at a limit; wait `retry_after` seconds
    ├── UnavailableError           no connection, model loading, server draining; wait `retry_after`
    ├── DeadlineExceededError      the timeout passed
    ├── CancelledError             the call was cancelled
    ├── UnauthenticatedError       API key missing, unknown or expired
    ├── PermissionDeniedError      API key without this right, or of another tenant
    ├── UnimplementedError         the server does not have this feature
    ├── InternalError              a fault of the server
    └── ProtocolError              the server's answer breaks the rules of the API

ResourceExhaustedError and UnavailableError have been retried by the channel before they are raised.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request (dotted path) and what is wrong with it."""

    field: str
    description: str


class RedraftClientError(Exception):
    """Base of all errors of the client.

    message: the server's text. reason: ErrorInfo.reason, a stable upper-case word, or "".
    code: the gRPC status; None if the error arose in the client.
    """

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason


class InvalidArgumentError(RedraftClientError):
    """A parameter is wrong. The client also raises it, before any call, for values that fit no field."""

    field_violations: tuple[FieldViolation, ...] = ()


class NotFoundError(RedraftClientError):
    """No such model or draft."""


class FailedPreconditionError(RedraftClientError):
    """The server's state forbids the call, for example a draft that does not fit the target."""

    violations: tuple[str, ...] = ()


class AlreadyExistsError(RedraftClientError):
    """A request with the same request_id is running."""


class AbortedError(RedraftClientError):
    """Another change came first."""


class _RetryableError(RedraftClientError):
    retry_after: float | None = None
    """Seconds to wait before the next try, if the server said so."""


class ResourceExhaustedError(_RetryableError):
    """The server is full, or the tenant has used up what it may."""


class UnavailableError(_RetryableError):
    """The server cannot be reached or does not take calls now."""


class DeadlineExceededError(RedraftClientError):
    """The timeout passed before the answer was complete."""


class CancelledError(RedraftClientError):
    """The call was cancelled, here or by the server."""


class UnauthenticatedError(RedraftClientError):
    """The API key is missing, unknown or expired."""


class PermissionDeniedError(RedraftClientError):
    """The API key does not allow this call, or not for this tenant."""


class UnimplementedError(RedraftClientError):
    """The server does not have this feature."""


class InternalError(RedraftClientError):
    """A fault of the server."""


class ProtocolError(RedraftClientError):
    """The server's answer breaks the rules of the API."""


_BY_CODE: dict[grpc.StatusCode, type[RedraftClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


def map_rpc_error(error: grpc.RpcError) -> RedraftClientError:
    """Turns an error of grpc or grpc.aio into one of the tree, with what its google.rpc details say."""
    call = cast(grpc.Call, error)  # sync and aio errors both have code, details and trailing_metadata
    code = call.code()
    trailers = dict(call.trailing_metadata() or ())
    details = _Details.parse(trailers.get(_DETAILS_KEY))
    message = call.details() or code.name
    mapped = _BY_CODE.get(code, InternalError)(message, code=code, reason=details.reason)
    if isinstance(mapped, InvalidArgumentError):
        mapped.field_violations = details.field_violations
    elif isinstance(mapped, FailedPreconditionError):
        mapped.violations = details.preconditions
    elif isinstance(mapped, _RetryableError):
        mapped.retry_after = details.retry_after
        if mapped.retry_after is None:
            mapped.retry_after = _pushback_seconds(trailers.get(_PUSHBACK_KEY))
    return mapped


def _pushback_seconds(value: str | bytes | None) -> float | None:
    try:
        milliseconds = int(value) if value is not None else -1
    except ValueError:
        return None
    return milliseconds / 1000 if milliseconds >= 0 else None  # negative: "do not retry"


@dataclass(frozen=True, slots=True)
class _Details:
    """What the google.rpc details of a status say; the parts that we use."""

    reason: str = ""
    retry_after: float | None = None
    field_violations: tuple[FieldViolation, ...] = ()
    preconditions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: str | bytes | None) -> "_Details":
        """Reads `grpc-status-details-bin`; details that cannot be read count as absent."""
        if not isinstance(raw, bytes):
            return cls()
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad_request = error_details_pb2.BadRequest()
        precondition = error_details_pb2.PreconditionFailure()
        has_retry = False
        try:
            for detail in status_pb2.Status.FromString(raw).details:
                detail.Unpack(info)
                has_retry = detail.Unpack(retry) or has_retry
                detail.Unpack(bad_request)
                detail.Unpack(precondition)
        except DecodeError:
            return cls()
        return cls(
            reason=info.reason,
            retry_after=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
            field_violations=tuple(_violations(bad_request.field_violations)),
            preconditions=tuple(v.description or v.subject for v in precondition.violations),
        )


def _violations(
    violations: Iterable[error_details_pb2.BadRequest.FieldViolation],
) -> Iterable[FieldViolation]:
    return (FieldViolation(field=v.field, description=v.description) for v in violations)
