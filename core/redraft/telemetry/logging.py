"""Log lines on one stream, as JSON for collectors or as text for people; never a prompt.

Four rules keep user text out, whoever logs:

- only our own loggers write below warning, whatever the level: at debug, a library may write what passes through
  it (botocore logs the bodies of its requests);
- of the `extra=` fields only the names in `EXTRA_FIELDS` are written; the rest is left out;
- a traceback is written as places (file, line, function), without source lines and local values;
- the message of an exception is written only for kinds that the operating system or torch raises
  (`OSError`, `RuntimeError`, `MemoryError`). A `ValueError`, `KeyError` or validation error commonly quotes
  the input it rejects, so of those only the type is named.

What remains is the message itself: write it as a constant with ids and numbers.

`log_ids` puts the ids of the request at hand on every line that is written on its behalf.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from traceback import extract_tb
from types import MappingProxyType
from typing import Literal, TextIO

EXTRA_FIELDS = frozenset(
    {
        *(
            "request_id",
            "request_ids",
            "trace_id",
            "model",
            "draft_version",
            "proposer",
            "method",
            "code",
            "finish_reason",
            "tenant",
        ),
        *("prompt_tokens", "generation_tokens", "cached_prompt_tokens", "num_sequences", "blocks"),
        *("address", "path", "shard", "records", "bytes", "reason", "count", "seconds", "signal"),
    }
)
"""The only `extra=` names that reach a log line: ids, enumerations, sizes and times."""

Format = Literal["text", "json"]

OWN_LOGGERS = ("redraft", "redraft_server", "redraft_training")
"""Roots of our loggers' names."""

_ids: ContextVar[Mapping[str, str]] = ContextVar("redraft_log_ids", default=MappingProxyType({}))

_MESSAGE_IS_SAFE = (OSError, RuntimeError, MemoryError)
_MAX_FRAMES = 30
_MAX_CHAIN = 5


def log_ids(**ids: str) -> None:
    """Put `ids` (names of `EXTRA_FIELDS`) on every later line of the current task, in place of those it had.

    A task started from it has them too, and so has a call by `asyncio.to_thread`; other threads do not.
    """
    _ids.set(ids)


def configure_logging(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Send all loggers to `stream` (stderr unless given). Calling again replaces the former set-up.

    `level` is a level name of the standard library in any case; libraries write from warning on.
    Raises ValueError for another word.
    """
    formatter = JsonFormatter() if format == "json" else TextFormatter()
    handler = _RedraftHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    own_level = level.upper()
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(own_level)
    root.setLevel(max(logging.getLogger(OWN_LOGGERS[0]).level, logging.WARNING))
    for old in [h for h in root.handlers if isinstance(h, _RedraftHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)


class _RedraftHandler(logging.StreamHandler[TextIO]):
    """A type of its own: only our handler is replaced, never one that a host program or a test installed."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the allowed extras, and an exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_extras(record),
        }
        error = _exception(record)
        if error is not None:
            fields["exception"] = error
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """`time level logger: message key=value ...`, always on one line."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={value}" for key, value in _extras(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {_message(record)}{pairs}"
        error = _exception(record)
        if error is not None:
            line += " | " + " < ".join(error)
        # A forged line break in an id must not look like a line of ours.
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    # asyncio appends the objects concerned, one a line, with whatever text their exceptions hold
    return message.partition("\n")[0] if record.name == "asyncio" else message


def _extras(record: logging.LogRecord) -> dict[str, object]:
    own = {key: value for key, value in vars(record).items() if key in EXTRA_FIELDS}
    return dict(sorted({**_ids.get(), **own}.items()))


def _exception(record: logging.LogRecord) -> list[str] | None:
    """The exception and its causes, outermost first, then the places of the innermost; None without one."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return None
    chain: list[BaseException] = []
    while error is not None and len(chain) < _MAX_CHAIN:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    described = [_describe(link) for link in chain]
    frames = extract_tb(chain[-1].__traceback__)[-_MAX_FRAMES:]
    return described + [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]


def _describe(error: BaseException) -> str:
    name = type(error).__qualname__
    return f"{name}: {error}" if isinstance(error, _MESSAGE_IS_SAFE) else name
