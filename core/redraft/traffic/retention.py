"""Deletes shards that are too old or too many, and the temporary files that crashes left behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from redraft.object_store import is_unreachable
from redraft.traffic.layout import LogFile, list_files, open_root

logger = logging.getLogger(__name__)

_TEMPORARY_MAX_AGE_S = 3600.0
"""Writing one shard takes seconds, so a temporary file this old has no writer any more."""


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What was deleted, and what could not be."""

    deleted_shards: tuple[str, ...]
    deleted_temporary: tuple[str, ...]
    failed: tuple[str, ...]
    """Paths that the store refused to delete; the next run tries again."""
    remaining_bytes: int
    """Size of the shards that are still there."""


def apply_retention(url: str, max_age_s: float | None, max_bytes: int | None, now: float) -> RetentionReport:
    """Delete shards older than `max_age_s`, then the oldest until at most `max_bytes` are left.

    None is no such limit. `now` is Unix seconds. A shard's age counts from when it was written, so a record may
    outlive `max_age_s` by the writer's `roll_seconds`. Files that the writer did not name are never touched. Safe
    to run beside writers, readers and another retention. Raises OSError if the store cannot be listed.
    """
    filesystem, root = open_root(url)
    files, _ = list_files(filesystem, root)
    shards = [file for file in files if not file.is_temporary]
    stale = [file for file in files if file.is_temporary and now - file.written_unix_s > _TEMPORARY_MAX_AGE_S]
    failed: list[str] = []
    expired = _expired(shards, max_age_s, max_bytes, now)
    deleted_shards = _delete(filesystem, expired, failed)
    deleted_temporary = _delete(filesystem, stale, failed)
    gone = {shard.path for shard in expired}.difference(failed)  # perhaps by another retention
    remaining = sum(shard.num_bytes for shard in shards if shard.path not in gone)
    if failed:
        logger.warning("traffic retention could not delete files", extra={"count": len(failed), "path": failed[0]})
    return RetentionReport(deleted_shards, deleted_temporary, tuple(failed), remaining)


def _expired(shards: list[LogFile], max_age_s: float | None, max_bytes: int | None, now: float) -> list[LogFile]:
    """`shards` are oldest first, and so is the result."""
    excess = 0 if max_bytes is None else sum(shard.num_bytes for shard in shards) - max_bytes
    expired = []
    for shard in shards:
        is_too_old = max_age_s is not None and now - shard.written_unix_s > max_age_s
        if not is_too_old and excess <= 0:
            break
        expired.append(shard)
        excess -= shard.num_bytes
    return expired


def _delete(filesystem: Any, files: list[LogFile], failed: list[str]) -> tuple[str, ...]:
    deleted = []
    for index, file in enumerate(files):
        try:
            filesystem.rm_file(file.path)
        except FileNotFoundError:
            continue
        except Exception as error:  # every store raises its own kinds; one file must not protect the others
            if is_unreachable(error):  # each of them would take as long to fail
                failed += [left.path for left in files[index:]]
                break
            failed.append(file.path)
        else:
            deleted.append(file.path)
    return tuple(deleted)
