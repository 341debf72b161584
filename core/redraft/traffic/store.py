"""Puts one finished shard into the store so that it is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from redraft.files import sync_directory
from redraft.traffic.layout import TEMPORARY_SUFFIX


def put_whole(filesystem: Any, path: str, data: bytes) -> None:
    """Write `data` to `path`. Raises whatever the store raises (OSError locally); calling again is then safe.

    Locally: a temporary file, fsync, rename. An object store shows an object only once it is complete, so
    there one request does it.
    """
    if isinstance(filesystem, LocalFileSystem):
        _put_local(Path(path), data)
    else:
        filesystem.pipe_file(path, data)


def _put_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        # 0600 from the first byte: token ids decode to what users wrote.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)
