"""Files and directories that appear whole or not at all; knows nothing of models."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes (1 to 2 GB/s)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(target: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory beside `target`; on success it becomes `target` in one rename.

    It is then readable by all, or with `private` by its owner only.

    On an exception nothing is left at `target`. A process killed in between leaves only a hidden temporary
    directory. Raises `FileExistsError` if `target` has come to exist meanwhile and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        directory_mode, file_mode = (0o700, 0o600) if private else (0o755, 0o644)
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(directory_mode if path.is_dir() else file_mode)
        try:
            temporary.rename(target)
        except OSError as error:
            if target.exists():
                raise FileExistsError(f"{target} already exists") from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file (readable by all) that appears, or replaces another, whole or not at all. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.fchmod(descriptor, 0o644)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory (a file just renamed into it) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
