"""The server's own log as a test reads it: JSON lines, with every set-up of the loggers undone afterwards."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redraft.telemetry.logging import OWN_LOGGERS, configure_logging


class LogLines:
    """What has been logged so far."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def of(self, logger: str) -> list[dict[str, Any]]:
        """The lines of one logger."""
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["logger"] == logger]


@contextmanager
def json_log(level: str = "info") -> Iterator[LogLines]:
    """Everything logged inside, as `logging.format: json` writes it."""
    with untouched_loggers():
        stream = io.StringIO()
        configure_logging("json", level, stream)
        yield LogLines(stream)


@contextmanager
def untouched_loggers() -> Iterator[None]:
    """Whatever is configured inside is undone."""
    loggers = [logging.getLogger(), *map(logging.getLogger, OWN_LOGGERS)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
