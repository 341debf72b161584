"""Where converted models are kept, and how a directory is written so that no reader sees half of it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir
from rich.console import Console

CACHE_DIR_VARIABLE = "REDRAFT_CACHE_DIR"

Progress = Callable[[str], None]
"""Receives one line at the start of each long step (a download, a conversion)."""


def cache_directory() -> Path:
    """The cache's root: `$REDRAFT_CACHE_DIR`, or `redraft` in the user's cache directory."""
    override = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(override).expanduser() if override else Path(user_cache_dir("redraft"))


def stderr_progress(line: str) -> None:
    """Show a progress line on standard error."""
    Console(stderr=True, highlight=False).print(line, style="dim", markup=False, soft_wrap=True)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes (1 to 2 GB/s)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` (created, and left behind empty) against other processes.

    The kernel releases it when the holder dies, so a crash never blocks the next start.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `target`; on success it becomes `target` in one rename.

    On an exception nothing is left at `target`. A process killed in between leaves only a hidden temporary
    directory. Raises `FileExistsError` if `target` has come to exist meanwhile and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):  # made private; what is published is readable
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            temporary.rename(target)
        except OSError as error:
            if target.exists():
                raise FileExistsError(f"{target} already exists") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
