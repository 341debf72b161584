"""What a program says and does when an object store does not do what it should; the real one is in tests/ops/s3."""

from __future__ import annotations

import importlib
import sys

import pytest

from redraft import object_store
from redraft.object_store import StoreUnavailable, ask, explain, is_misconfigured, open_url


class NoCredentialsError(Exception):
    """Called as botocore's, which is imported only where S3 is used."""


class Requests:
    """Fails with each of these, then gives `found`."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.count = list(errors), 0

    def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "found"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.0)


def missing_bucket() -> FileNotFoundError:
    error = FileNotFoundError("The specified bucket does not exist")
    error.__cause__ = Exception()
    error.__cause__.response = {"Error": {"Code": "NoSuchBucket"}}  # type: ignore[attr-defined]
    return error


def test_a_passing_failure_is_tried_again_and_then_reported() -> None:
    two = Requests(ConnectionError(), OSError("reset"))
    assert ask("read a", two) == "found"
    assert two.count == 3
    many = Requests(*(ConnectionError() for _ in range(9)))
    with pytest.raises(StoreUnavailable, match=r"^cannot read a: the store cannot be reached \(ConnectionError\)$"):
        ask("read a", many)
    assert many.count == 3


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), NoCredentialsError(), missing_bucket()])
def test_what_somebody_has_to_put_right_is_asked_once(error: Exception) -> None:
    requests = Requests(error)
    with pytest.raises(StoreUnavailable):
        ask("read a", requests)
    assert requests.count == 1
    assert is_misconfigured(error)


def test_an_object_that_does_not_exist_is_no_outage() -> None:
    requests = Requests(FileNotFoundError("bucket/a"))
    with pytest.raises(FileNotFoundError):
        ask("read a", requests)
    assert requests.count == 1
    assert not is_misconfigured(FileNotFoundError("bucket/a"))


def test_no_further_try_after_one_that_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_STOP_TRYING_S", 0.0)
    requests = Requests(ConnectionError())
    with pytest.raises(StoreUnavailable):
        ask("read a", requests)
    assert requests.count == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (missing_bucket(), "the bucket does not exist"),
        (
            PermissionError("The difference between\nthe clocks is too large"),
            "access denied (The difference between the",
        ),
        (NoCredentialsError("Unable to locate"), "no credentials were found"),
        (ValueError("Invalid endpoint: s3.example"), "Invalid endpoint: s3.example"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (KeyError("a secret, perhaps"), "KeyError"),
    ],
)
def test_explanations_are_one_line_without_what_nobody_knows(error: Exception, text: str) -> None:
    assert explain(error).startswith(text)
    assert "\n" not in explain(error)
    assert "secret" not in explain(error)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ImportError, match=r"s3fs.*: pip install 'redraft\[s3\]'$"):
        open_url("s3://bucket/traffic")
