"""Statuses become the errors of the tree, with their details; what is retried and what is not."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details

from redraft.v1 import draft_pb2
from redraft_client import errors
from tests.unit.client.conftest import AsyncDriver, Driver, SyncDriver
from tests.unit.client.fake_server import HANG, Failure, FakeServer, response, stream_responses

Code = grpc.StatusCode
NO_RETRY = (("grpc-retry-pushback-ms", "-1"),)


def fail_both(fake: FakeServer, driver: Driver, failure: Any, **kwargs: Any) -> list[errors.RedraftClientError]:
    """The errors of a unary call and of a stream that meet the same failure."""
    fake.answers |= {"Generate": [failure], "StreamGenerate": [failure]}
    caught = []
    for call in (lambda: driver.call("generate", "x", **kwargs), lambda: driver.stream("x", **kwargs)):
        with pytest.raises(errors.RedraftClientError) as info:
            call()
        caught.append(info.value)
    return caught


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, errors.InvalidArgumentError),
        (Code.NOT_FOUND, errors.NotFoundError),
        (Code.FAILED_PRECONDITION, errors.FailedPreconditionError),
        (Code.ALREADY_EXISTS, errors.AlreadyExistsError),
        (Code.ABORTED, errors.AbortedError),
        (Code.RESOURCE_EXHAUSTED, errors.ResourceExhaustedError),
        (Code.UNAVAILABLE, errors.UnavailableError),
        (Code.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (Code.CANCELLED, errors.CancelledError),
        (Code.UNAUTHENTICATED, errors.UnauthenticatedError),
        (Code.PERMISSION_DENIED, errors.PermissionDeniedError),
        (Code.UNIMPLEMENTED, errors.UnimplementedError),
        (Code.INTERNAL, errors.InternalError),
        (Code.UNKNOWN, errors.InternalError),
        (Code.DATA_LOSS, errors.InternalError),
    ],
)
def test_each_code_has_its_error(
    fake: FakeServer, driver: Driver, code: grpc.StatusCode, kind: type[errors.RedraftClientError]
) -> None:
    for error in fail_both(fake, driver, Failure(code, "because", trailers=NO_RETRY)):
        assert type(error) is kind
        assert error.code is code
        assert (str(error), error.message, error.reason) == ("because", "because", "")


def test_field_violations(fake: FakeServer, driver: Driver) -> None:
    violation = details.BadRequest.FieldViolation(field="generation.sampling.top_p", description="must be > 0")
    failure = Failure(Code.INVALID_ARGUMENT, "bad", (details.BadRequest(field_violations=[violation]),))
    for error in fail_both(fake, driver, failure):
        assert isinstance(error, errors.InvalidArgumentError)
        assert error.field_violations == (errors.FieldViolation("generation.sampling.top_p", "must be > 0"),)


def test_preconditions_and_reason(fake: FakeServer, driver: Driver) -> None:
    failed = details.PreconditionFailure(
        violations=[details.PreconditionFailure.Violation(subject="draft/v8", description="other vocabulary")]
    )
    info = details.ErrorInfo(reason="DRAFT_INCOMPATIBLE", domain="redraft")
    fake.answers["ActivateDraft"] = [Failure(Code.FAILED_PRECONDITION, "no", (info, failed))]
    with pytest.raises(errors.FailedPreconditionError) as caught:
        driver.call("activate_draft", "v8")
    assert caught.value.violations == ("other vocabulary",)
    assert caught.value.reason == "DRAFT_INCOMPATIBLE"


@pytest.mark.parametrize(
    ("failure", "retry_after"),
    [
        (Failure(Code.UNAVAILABLE, "no", (details.RetryInfo(retry_delay=Duration(seconds=2)),), NO_RETRY), 2.0),
        (Failure(Code.RESOURCE_EXHAUSTED, "no", trailers=NO_RETRY), None),
        (Failure(Code.UNAVAILABLE, "no", trailers=(("grpc-retry-pushback-ms", "1"),)), 0.001),
        (Failure(Code.UNAVAILABLE, "no", trailers=(("grpc-retry-pushback-ms", "soon"),)), None),
    ],
)
def test_retry_after(fake: FakeServer, driver: Driver, failure: Failure, retry_after: float | None) -> None:
    for error in fail_both(fake, driver, failure):
        assert isinstance(error, errors.UnavailableError | errors.ResourceExhaustedError)
        assert error.retry_after == retry_after


def test_details_that_cannot_be_read_do_not_hide_the_error(fake: FakeServer, driver: Driver) -> None:
    failure = Failure(Code.NOT_FOUND, "no model", trailers=(("grpc-status-details-bin", b"\xff\xff\xff"),))
    for error in fail_both(fake, driver, failure):
        assert isinstance(error, errors.NotFoundError)
        assert error.message == "no model"


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
def test_a_refused_call_is_retried_when_the_server_says_so(
    fake: FakeServer, driver: Driver, code: grpc.StatusCode
) -> None:
    refused = Failure(code, trailers=(("grpc-retry-pushback-ms", "1"),))
    fake.answers |= {"Generate": [refused, refused, response()], "StreamGenerate": [refused, stream_responses()]}
    assert driver.call("generate", "x").text == "Hello there"
    assert fake.methods() == ["Generate"] * 3
    _, result = driver.stream("x")
    assert result is not None
    assert fake.methods() == ["Generate"] * 3 + ["StreamGenerate"] * 2


def test_retries_end(fake: FakeServer, driver: Driver) -> None:
    fail_both(fake, driver, Failure(Code.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", "1"),)))
    assert fake.methods() == ["Generate"] * 4 + ["StreamGenerate"] * 4


def test_a_negative_pushback_stops_the_retries(fake: FakeServer, driver: Driver) -> None:
    fail_both(fake, driver, Failure(Code.UNAVAILABLE, trailers=NO_RETRY))
    assert fake.methods() == ["Generate", "StreamGenerate"]


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED])
def test_other_errors_are_not_retried(fake: FakeServer, driver: Driver, code: grpc.StatusCode) -> None:
    fail_both(fake, driver, Failure(code))
    assert fake.methods() == ["Generate", "StreamGenerate"]


def test_changes_of_the_draft_are_never_sent_twice(fake: FakeServer, driver: Driver) -> None:
    refused = Failure(Code.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", "1"),))
    fake.answers |= {
        "RollbackDraft": [refused, draft_pb2.RollbackDraftResponse()],
        "ListDrafts": [refused, draft_pb2.ListDraftsResponse()],
    }
    with pytest.raises(errors.UnavailableError):
        driver.call("rollback_draft")
    assert driver.call("list_drafts") == ()
    assert fake.methods() == ["RollbackDraft", "ListDrafts", "ListDrafts"]


def test_a_stream_that_has_begun_is_not_retried(fake: FakeServer, driver: Driver) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], Failure(Code.UNAVAILABLE, "gone")], stream_responses()]
    with pytest.raises(errors.UnavailableError, match="gone"):
        driver.stream("x")
    assert fake.methods() == ["StreamGenerate"]


def test_the_deadline_ends_a_call_that_hangs(fake: FakeServer, driver: Driver) -> None:
    fake.answers |= {"StreamGenerate": [[stream_responses()[0], HANG]], "Generate": [HANG]}
    with pytest.raises(errors.DeadlineExceededError):
        driver.call("generate", "x", timeout=0.2)
    with pytest.raises(errors.DeadlineExceededError):
        driver.stream("x", timeout=0.2)
    assert fake.call_ended.wait(timeout=10)


def test_nobody_listens(driver_kind: type[SyncDriver] | type[AsyncDriver]) -> None:
    driver = driver_kind("127.0.0.1:1")
    with pytest.raises(errors.UnavailableError) as caught:
        driver.call("generate", "x", timeout=30.0)
    driver.close()
    assert caught.value.retry_after is None


def test_a_response_that_is_too_large_is_resource_exhausted(fake: FakeServer, driver: Driver) -> None:
    large = response()
    large.choices[0].text = "x" * (17 * 1024 * 1024)
    fake.answers["Generate"] = [large]
    with pytest.raises(errors.ResourceExhaustedError):
        driver.call("generate", "x", timeout=30.0)


def test_chunks_before_the_error_have_been_delivered(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], Failure(Code.INTERNAL, "bug")]]
    driver = SyncDriver(fake.address)
    stream = driver.client.stream("x")
    assert next(stream).text == "Hello"
    with pytest.raises(errors.InternalError):
        next(stream)
    assert list(stream) == []  # an ended stream stays ended
    driver.close()


def test_every_error_is_in_the_drawn_tree() -> None:
    names = [kind.__name__ for kind in _public_subclasses(errors.RedraftClientError)]
    assert "InvalidArgumentError" in names
    assert [name for name in names if name not in (errors.__doc__ or "")] == []


def _public_subclasses(kind: type[errors.RedraftClientError]) -> Iterator[type[errors.RedraftClientError]]:
    for child in kind.__subclasses__():
        if not child.__name__.startswith("_"):
            yield child
        yield from _public_subclasses(child)
