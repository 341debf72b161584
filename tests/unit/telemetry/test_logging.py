"""What reaches a log line, and above all what does not."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from redraft.telemetry.logging import Format, configure_logging, log_ids
from tests.log_lines import untouched_loggers

SECRET = "my password is hunter2"

logger = logging.getLogger("redraft.test")


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    with untouched_loggers():
        yield


def configured(format: Format, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(format, level, stream)
    return stream


def only_json(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    fields: dict[str, Any] = json.loads(line)
    return fields


def raise_and_log(error: Exception, cause: Exception | None = None) -> None:
    try:
        raise error from cause
    except Exception:
        logger.exception("step failed")


def test_json_has_the_allowed_extras_only() -> None:
    stream = configured("json")
    logger.info("request finished", extra={"request_id": "r1", "generation_tokens": 5, "prompt": SECRET})

    fields = only_json(stream)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "info",
        "logger": "redraft.test",
        "message": "request finished",
        "request_id": "r1",
        "generation_tokens": 5,
    }


def test_text_is_one_line_even_if_an_id_has_line_breaks() -> None:
    stream = configured("text")
    logger.info("refused", extra={"request_id": "a\n2026 INFO forged\x1b[31m", "prompt": SECRET})

    (line,) = stream.getvalue().splitlines()
    assert line.endswith("INFO    redraft.test: refused request_id=a\\n2026 INFO forged\\x1b[31m")


@pytest.mark.parametrize("format", ["json", "text"])
def test_exceptions_that_quote_their_input_are_only_named(format: Format) -> None:
    stream = configured(format)
    raise_and_log(ValueError(SECRET), cause=KeyError(SECRET))

    assert SECRET not in stream.getvalue()
    assert "ValueError" in stream.getvalue()
    assert "KeyError" in stream.getvalue()


def test_system_errors_keep_their_message_and_place() -> None:
    stream = configured("json")
    raise_and_log(OSError(28, "No space left on device"))

    described, *places = only_json(stream)["exception"]
    assert described == "OSError: [Errno 28] No space left on device"
    assert "test_logging.py" in places[0]
    assert "raise_and_log" in places[0]


def test_configuring_again_replaces_the_handler_and_the_level() -> None:
    first = configured("text", "debug")
    second = configured("json", "warning")
    logger.info("too quiet")
    logger.warning("heard")

    assert first.getvalue() == ""
    assert only_json(second)["message"] == "heard"


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configured("text", "loud")


def test_libraries_write_from_warning_on_whatever_the_level() -> None:
    stream = configured("json", "debug")
    logging.getLogger("botocore.endpoint").debug("Making request with params: %s", SECRET)
    logging.getLogger("httpx").info("HTTP Request: GET /%s", SECRET)
    logger.debug("ours")
    assert only_json(stream)["message"] == "ours"


async def test_asyncio_does_not_quote_the_objects_concerned() -> None:
    stream = configured("json")
    asyncio.get_running_loop().call_exception_handler({"message": "Task failed", "exception": ValueError(SECRET)})
    fields = only_json(stream)
    assert (fields["message"], fields["exception"]) == ("Task failed", ["ValueError"])
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(ValueError(SECRET))
    del failed
    gc.collect()
    assert "never retrieved" in stream.getvalue()
    assert SECRET not in stream.getvalue()


async def test_ids_are_on_every_line_of_the_task_and_on_no_other() -> None:
    stream = configured("json")

    async def answer(request_id: str) -> None:
        log_ids(request_id=request_id, trace_id="t" + request_id)
        await asyncio.sleep(0)
        logger.info("first")
        await asyncio.to_thread(logger.info, "in a thread", extra={"bytes": 1})

    await asyncio.gather(answer("1"), answer("2"))
    logger.info("outside")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted((line["request_id"], line["trace_id"]) for line in lines[:4]) == [("1", "t1")] * 2 + [("2", "t2")] * 2
    assert {line["message"] for line in lines[:4]} == {"first", "in a thread"}
    assert "request_id" not in lines[4]
