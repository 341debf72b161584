"""Where shards lie under the log's root, and what their names say.

    v1/dt=2026-11-24/hour=13/019ab5c2-7e4f-7c31-9d02-5b6f0a1c2d3e-host7-4711.parquet

`v1` is the schema version, the hour is UTC at the time of writing, and the name is a UUIDv7 (its first 48
bits are Unix milliseconds, so names sort by time) with host and process, which tells replicas apart. A file
still being written ends in `.tmp`; after a crash it stays, and readers skip it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Any
from uuid import UUID

from redraft.object_store import ask, is_local, open_url
from redraft.traffic.record import SCHEMA_VERSION

TEMPORARY_SUFFIX = ".tmp"
PROBE = ".writable"
"""An empty file under the root, written when a server starts, to learn whether it can."""
ERASURES = "erasures"
"""Directory under the root with what was asked to be deleted, see `redraft.traffic.erasure`."""

_SHARD = re.compile(
    r"v(?P<version>\d+)/dt=\d{4}-\d{2}-\d{2}/hour=\d{2}/"
    r"(?P<uuid>[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12})-[A-Za-z0-9_]+-\d+\.parquet"
    r"(?P<temporary>\.tmp)?"
)


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of ours, finished (a shard) or temporary."""

    path: str
    """As the file system names it."""
    schema_version: int
    written_unix_s: float
    """From its name, so that a copy keeps it. No record in the file is younger."""
    num_bytes: int
    is_temporary: bool


def new_shard_name(unix_s: float, sequence: int, host: str, pid: int) -> str:
    """A path under the root that nobody else will choose. `sequence` orders a writer's shards of one millisecond."""
    milliseconds = ceil(unix_s * 1000)  # up: never before the records in it
    bits = (
        (milliseconds & (2**48 - 1)) << 80 | 7 << 76 | (sequence & (2**12 - 1)) << 64 | 2 << 62 | secrets.randbits(62)
    )
    now = datetime.fromtimestamp(unix_s, UTC)
    host = re.sub(r"[^A-Za-z0-9_]", "_", host) or "host"
    return f"v{SCHEMA_VERSION}/dt={now:%Y-%m-%d}/hour={now:%H}/{UUID(int=bits)}-{host}-{pid}.parquet"


def open_root(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL (a plain path is local), and the root's path on it.

    Raises ValueError for a protocol that fsspec does not know, ImportError if its package is missing.
    """
    return open_url(url)


def parse_shard_name(name: str, num_bytes: int, path: str) -> LogFile | None:
    """What a name under the root says of its file; None if it is not one of ours."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return None
    written = (UUID(match["uuid"]).int >> 80) / 1000
    return LogFile(path, int(match["version"]), written, num_bytes, match["temporary"] is not None)


def list_files(filesystem: Any, root: str) -> tuple[list[LogFile], list[str]]:
    """All files under the root: ours, oldest first, and the paths of foreign ones. A missing root is empty.

    Raises OSError when the store cannot be listed, a bucket that does not exist included.
    """
    filesystem.invalidate_cache(root)

    def find() -> dict[str, Any]:
        found: dict[str, Any] = filesystem.find(root, detail=True)
        return found

    infos = find() if is_local(filesystem) else ask(f"list {root}", find)
    ours, foreign = [], []
    for path, info in infos.items():
        name = path.removeprefix(root).lstrip("/")
        file = parse_shard_name(name, info.get("size") or 0, path)
        if file is not None:
            ours.append(file)
        elif name != PROBE and not name.startswith(f"{ERASURES}/"):
            foreign.append(path)
    return sorted(ours, key=lambda file: (file.written_unix_s, file.path)), sorted(foreign)
