"""Puts finished shards into a store so that each is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from redraft.files import sync_directory
from redraft.object_store import ask, is_local, upload
from redraft.traffic.layout import TEMPORARY_SUFFIX, open_root


class ShardStore(Protocol):
    """Takes the shards that a writer has finished."""

    @property
    def place(self) -> str:
        """Where they go, for log lines."""

    @property
    def delivers_later(self) -> bool:
        """After `put` a shard is on its way, and whoever brings it into the log counts its records."""

    def put(self, name: str, data: bytes, num_records: int) -> None:
        """Take over a shard. Raises whatever prevents it; calling again with the same name is then safe."""


class DirectStore:
    """A log that shards are written into at once. Raises ValueError or ImportError for a URL that cannot be opened."""

    delivers_later = False

    def __init__(self, url: str) -> None:
        self._filesystem, self.place = open_root(url)

    def put(self, name: str, data: bytes, num_records: int) -> None:
        """See `ShardStore`."""
        put_whole(self._filesystem, f"{self.place}/{name}", data)


def put_whole(filesystem: Any, path: str, data: bytes, *, temporary: str | None = None) -> None:
    """Write `data` to `path`. Raises OSError; calling again is then safe.

    Locally: a temporary file, fsync, rename. An object store shows an object only once it is complete; there the
    request is tried a few times. `temporary` names that file (default: `path` with a suffix), for a path that is
    written more than once: one that was killed leaves it behind, and nobody takes over what may be another's.
    """
    if is_local(filesystem):
        _put_local(Path(path), data, temporary)
    else:
        ask(f"write {path}", lambda: upload(filesystem, data, path))


def _put_local(path: Path, data: bytes, name: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(name or path.name + TEMPORARY_SUFFIX)
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
