"""Log lines on one stream, as JSON for collectors or as text for people; never a prompt.

Three rules keep user text out, whoever logs:

- of the `extra=` fields only the names in `EXTRA_FIELDS` are written; the rest is left out;
- a traceback is written as places (file, line, function), without source lines and local values;
- the message of an exception is written only for kinds that the operating system or torch raises
  (`OSError`, `RuntimeError`, `MemoryError`). A `ValueError`, `KeyError` or validation error commonly quotes
  the input it rejects, so of those only the type is named.

What remains is the message itself: write it as a constant with ids and numbers.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from traceback import extract_tb
from typing import Literal, TextIO

EXTRA_FIELDS = frozenset(
    {
        *("request_id", "model", "draft_version", "proposer", "method", "code", "finish_reason"),
        *("prompt_tokens", "generation_tokens", "cached_prompt_tokens", "num_sequences", "blocks"),
        *("address", "path", "shard", "records", "bytes", "reason", "count", "seconds", "signal"),
    }
)
"""The only `extra=` names that reach a log line: ids, enumerations, sizes and times."""

Format = Literal["text", "json"]

_MESSAGE_IS_SAFE = (OSError, RuntimeError, MemoryError)
_MAX_FRAMES = 30
_MAX_CHAIN = 5


def configure_logging(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Send the root logger to `stream` (stderr unless given). Calling again replaces the former set-up.

    `level` is a level name of the standard library in any case. Raises ValueError for another word.
    """
    formatter = JsonFormatter() if format == "json" else TextFormatter()
    handler = _RedraftHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.setLevel(level.upper())
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
            "message": record.getMessage(),
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
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {record.getMessage()}{pairs}"
        error = _exception(record)
        if error is not None:
            line += " | " + " < ".join(error)
        # A forged line break in an id must not look like a line of ours.
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in sorted(vars(record).items()) if key in EXTRA_FIELDS}


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
