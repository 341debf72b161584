"""Where converted models are kept, and how a directory is written so that no reader sees half of it."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir
from rich.console import Console

from redraft.files import atomic_directory as atomic_directory
from redraft.files import sha256_file as sha256_file

_log = logging.getLogger("redraft.models")

CACHE_DIR_VARIABLE = "REDRAFT_CACHE_DIR"

Progress = Callable[[str], None]
"""Receives one line at the start of each long step (a download, a conversion)."""


def cache_directory() -> Path:
    """The cache's root: `$REDRAFT_CACHE_DIR`, or `redraft` in the user's cache directory."""
    override = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(override).expanduser() if override else Path(user_cache_dir("redraft"))


def stderr_progress(line: str) -> None:
    """Show a progress line on standard error: to a person as it is, to a collector of logs as one of them."""
    if _log.hasHandlers() and not sys.stderr.isatty():
        _log.info("%s", line)
        return
    Console(stderr=True, highlight=False).print(line, style="dim", markup=False, soft_wrap=True)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` (created, and left behind empty) against other processes.

    The kernel releases it when the holder dies, so a crash never blocks the next start.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
