"""Object storage, one way for the traffic log, the draft registry and the trainer: any fsspec URL.

Credentials, region and endpoint come from the environment, as the store's own tools read them (for `s3://`:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, a profile or workload identity; `AWS_DEFAULT_REGION`;
`AWS_ENDPOINT_URL` for a store that is not AWS). Nothing of it is a setting of ours.

Each request is made once by the libraries below. Whoever calls tries again, so that there is one place to read
how long something can take: `REQUEST_TIMEOUT_S` times the tries that `few_tries` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

_Result = TypeVar("_Result")

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
"""Longest wait for an answer, the time to send a part included."""
PART_BYTES = 8 * 2**20
"""Files of twice this and more go up in parts, each tried and paid for by itself."""
_PARALLEL_PARTS = 2

_TRIES = 3
_STOP_TRYING_S = 20.0  # no further try after a first one that hung
FIRST_WAIT_S = 0.3  # at random below this, then below twice as much

_S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": REQUEST_TIMEOUT_S,
        "retries": {"total_max_attempts": 1},
    },
    "use_listings_cache": False,
}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")
_BAD_REQUEST = ("ParamValidationError", "InvalidConfigError", "InvalidRegionError")
_NO_CONNECTION = ("ConnectionError", "HTTPClientError", "TimeoutError", "FSTimeoutError")


class StoreUnavailable(OSError):
    """A store cannot be reached, or refuses. The text is one line, without credentials."""


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL (a plain path is local), and the path on it, without a slash at the end.

    Touches nothing yet. Raises ValueError for a protocol that fsspec does not know, ImportError if its package is
    missing.
    """
    is_s3 = url.startswith(("s3://", "s3a://"))
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **(_S3_OPTIONS if is_s3 else {}))
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'redraft[s3]'" if is_s3 else str(error)) from None
    if is_s3:
        filesystem.retries = 1
    return filesystem, root.rstrip("/")


def is_local(filesystem: Any) -> bool:
    """Whether files are on this machine, where they can be renamed."""
    return isinstance(filesystem, LocalFileSystem)


def few_tries(is_passing: Callable[[BaseException], bool]) -> Retrying:
    """Tries what raises a passing error three times within seconds; the last error is raised."""
    return Retrying(
        stop=stop_after_attempt(_TRIES) | stop_after_delay(_STOP_TRYING_S),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=5.0),
        retry=retry_if_exception(is_passing),
        reraise=True,
    )


def ask(doing: str, request: Callable[[], _Result]) -> _Result:
    """What a request to a remote store gives, after a few tries.

    Raises FileNotFoundError if the object does not exist, and StoreUnavailable, `doing` in its text, for all else,
    a bucket that does not exist included.
    """

    def attempt() -> _Result:
        try:
            return request()
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not is_missing_bucket(error):
                raise
            raise StoreUnavailable(f"cannot {doing}: {explain(error)}") from error

    return few_tries(_may_pass)(attempt)


def upload(filesystem: Any, source: Path | bytes, path: str) -> None:
    """Put a local file, or bytes, into a remote store: one try, in parts if it is large. Raises what the store raises.

    The object appears whole or not at all: an upload that is cut off leaves nothing that can be read.
    """
    options = {"chunksize": PART_BYTES, "max_concurrency": _PARALLEL_PARTS} if _is_s3(filesystem) else {}
    if isinstance(source, bytes):
        filesystem.pipe_file(path, source, **options)
    else:
        filesystem.put_file(str(source), path, **options)


def is_misconfigured(error: BaseException) -> bool:
    """Whether somebody has to change something before this can work: URL, bucket, credentials or permissions."""
    is_refused = isinstance(error, PermissionError | ValueError) or is_missing_bucket(error)
    return is_refused or _is_called(error, (*_NO_CREDENTIALS, *_BAD_REQUEST))


def is_unreachable(error: BaseException) -> bool:
    """Whether there was no answer, so that other requests would fail too."""
    return _is_called(error, _NO_CONNECTION)


def is_missing_bucket(error: BaseException) -> bool:
    """Whether a "not found" is about the bucket rather than the object."""
    reply = getattr(error.__cause__, "response", None)
    code = reply.get("Error", {}).get("Code") if isinstance(reply, dict) else None
    return isinstance(error, FileNotFoundError) and code == "NoSuchBucket"


def explain(error: BaseException) -> str:
    """What went wrong in a store, in a few words for an operator. Stores raise exceptions of many libraries."""
    if is_missing_bucket(error):
        return "the bucket does not exist"
    if isinstance(error, PermissionError):
        return f"access denied ({_line(error)})"
    if _is_called(error, _NO_CREDENTIALS):
        return "no credentials were found (for s3://: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
    if is_unreachable(error):
        return f"the store cannot be reached ({type(error).__name__})"
    if isinstance(error, ValueError) or _is_called(error, _BAD_REQUEST):
        return _line(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable) and not is_misconfigured(error.__cause__ or error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _is_called(error: BaseException, names: tuple[str, ...]) -> bool:
    """By name, since the libraries of a store are imported only where one is used."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _is_s3(filesystem: Any) -> bool:
    return "s3" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
