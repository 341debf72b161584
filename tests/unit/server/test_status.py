"""Statuses: codes, details, and the trailers that clients act on."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from redraft_server.engine.api import (
    AdmissionError,
    DuplicateRequestId,
    EngineUnavailable,
    QueueFull,
    RequestTooLarge,
)
from redraft_server.rpc import status
from redraft_server.rpc.status import FieldViolation, StatusError


def details_of(error: StatusError) -> dict[str, Message]:
    """The details as a client unpacks them, by message name."""
    packed = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert packed.code == error.code.value[0]
    assert packed.message == error.message
    found: dict[str, Message] = {}
    for detail in packed.details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


def test_invalid_argument_lists_fields_in_message_and_details() -> None:
    error = status.invalid_argument([FieldViolation("generation.sampling.top_p", "must be above 0")])
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "generation.sampling.top_p: must be above 0"
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("generation.sampling.top_p", "must be above 0")


def test_many_long_violations_stay_within_header_limits() -> None:
    error = status.invalid_argument(FieldViolation(f"field{i}" * 100, "wrong " * 1000) for i in range(10_000))
    assert len(details_of(error)["BadRequest"].field_violations) == 8
    size = sum(len(value) for _, value in error.trailing_metadata()) * 4 / 3 + len(error.message)
    assert size < 8 * 1024
    assert "9997 more" in error.message


def test_long_model_names_are_not_echoed_whole() -> None:
    error = status.model_not_found("x" * 10_000, "served")
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert len(error.message) < 200
    info = details_of(error)["ErrorInfo"]
    assert (info.reason, info.domain, info.metadata["model"]) == ("MODEL_NOT_FOUND", "redraft", "served")


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.25, 250), (0.0, 1), (0.0001, 1), (90.0, 90_000)])
def test_a_full_queue_says_when_to_come_back(seconds: float, milliseconds: int) -> None:
    error = status.from_admission(QueueFull("full", seconds))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == str(milliseconds)
    details = details_of(error)
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds
    assert details["ErrorInfo"].reason == "QUEUE_FULL"


def test_unavailable_names_its_reason() -> None:
    error = status.from_admission(EngineUnavailable("SERVER_DRAINING", "shutting down"))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    details = details_of(error)
    assert details["ErrorInfo"].reason == "SERVER_DRAINING"
    assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestTooLarge("stopping.max_new_tokens", "too many"), grpc.StatusCode.INVALID_ARGUMENT),
        (RequestTooLarge("generation.text", "too long"), grpc.StatusCode.INVALID_ARGUMENT),
        (DuplicateRequestId("a"), grpc.StatusCode.ALREADY_EXISTS),
        (AdmissionError("something new"), grpc.StatusCode.INTERNAL),
    ],
)
def test_other_refusals(error: AdmissionError, code: grpc.StatusCode) -> None:
    assert status.from_admission(error).code is code


def test_too_large_names_the_field_as_the_caller_knows_it() -> None:
    error = status.from_admission(RequestTooLarge("stopping.max_new_tokens", "too many"))
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "generation.stopping.max_new_tokens"


def test_internal_carries_nothing() -> None:
    error = status.internal()
    assert error.message == "internal error"
    assert error.trailing_metadata() == ()
