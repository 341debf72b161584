"""Takes records out of the log's shards: what the erasures on record cover, and nothing else.

A shard that holds such records is written anew under its own name, whole or not at all (`put_whole`), and one that
holds nothing else is deleted. So a sweep that is killed has done some shards and not the others, no record of anybody
else is ever missing, and sweeping again ends with the same log. Writers are not in the way: they only add shards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redraft.files import sync_directory
from redraft.object_store import StoreUnavailable, ask, is_local
from redraft.traffic.erasure import Erasure, Erasures, keep_erasure, read_erasures
from redraft.traffic.layout import TEMPORARY_SUFFIX, LogFile, list_files, new_shard_name, open_root
from redraft.traffic.retention import apply_retention
from redraft.traffic.shard import encode_shard, open_shard
from redraft.traffic.store import put_whole

OnShard = Callable[[int, int], None]
"""Takes the number of shards done and of all."""

_KEY_COLUMNS = ["request_id", "tenant", "created_unix_s"]

_LONGEST_GATHERING_S = 86_400.0
"""A shard holds no record that is older than its name by more than this: `traffic_log.roll_seconds` is at most so."""


@dataclass(slots=True)
class SweepReport:
    """What a sweep found and did; of a dry run, what it would have done."""

    shards: int = 0
    """Searched."""
    records: int = 0
    """In these."""
    erased: int = 0
    """Records covered, over all passes."""
    rewritten: int = 0
    """Shards written anew, without some of their records."""
    deleted: int = 0
    """Shards with nothing else in them."""
    failed: dict[str, str] = field(default_factory=dict)
    """Shards that could not be searched or written, and why, by path: they may still hold what should go."""
    unfinished: int = 0
    """Temporary files: being written now, or left by a crash and deleted by a sweep or retention an hour later."""
    foreign: int = 0
    """Files that are not ours. They were not searched."""


def erase(url: str, erasure: Erasure, *, on_shard: OnShard = lambda done, total: None) -> SweepReport:
    """Put an erasure on record in the log at `url` and sweep it out.

    Raises OSError if the store cannot be listed, fails, or does not keep the erasure, `ErasureUnreadable`, and
    ValueError or ImportError for a URL that fsspec cannot open.
    """
    keep_erasure(*open_root(url), erasure)
    return sweep(url, on_shard=on_shard)


def count(url: str, erasure: Erasure, *, on_shard: OnShard = lambda done, total: None) -> SweepReport:
    """What `erase` would do, doing nothing. Raises as it does."""
    return _pass(*open_root(url), Erasures([erasure]), on_shard, dry_run=True)


def sweep(url: str, *, on_shard: OnShard = lambda done, total: None) -> SweepReport:
    """Take out what the erasures on record cover. Raises as `erase` does.

    Two sweeps at a time may write the same shard, and the later one may know less. It goes over the log again when
    it finds that, so that what was erased stays so. Temporary files that crashes left behind go too.
    """
    filesystem, root = open_root(url)
    total = SweepReport()
    while True:
        erasures = read_erasures(filesystem, root)
        if not erasures:
            return total
        report = _pass(filesystem, root, erasures, on_shard, dry_run=False)
        report.erased += total.erased
        report.rewritten += total.rewritten
        report.deleted += total.deleted
        total = report
        if read_erasures(filesystem, root).names <= erasures.names:
            apply_retention(url, None, None, time.time())
            return total


def _pass(filesystem: Any, root: str, erasures: Erasures, on_shard: OnShard, *, dry_run: bool) -> SweepReport:
    files, foreign = list_files(filesystem, root)
    report = SweepReport(foreign=len(foreign), unfinished=sum(file.is_temporary for file in files))
    newest = erasures.newest_unix_s + _LONGEST_GATHERING_S
    shards = [file for file in files if not file.is_temporary and file.written_unix_s < newest]
    for done, shard in enumerate(shards, start=1):
        try:
            _sweep_shard(filesystem, shard, erasures, report, dry_run=dry_run)
        except FileNotFoundError:
            pass  # deleted meanwhile, by retention or another sweep
        except StoreUnavailable:
            raise
        except (pa.ArrowException, OSError, EOFError, KeyError) as error:  # one file must not protect the others
            report.failed[shard.path] = _reason(error)
        on_shard(done, len(shards))
    return report


def _sweep_shard(filesystem: Any, shard: LogFile, erasures: Erasures, report: SweepReport, *, dry_run: bool) -> None:
    with open_shard(filesystem, shard.path) as stream:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        covered = _covered(parquet.read(columns=_KEY_COLUMNS), erasures)
        num_covered = sum(covered)
        rest = None
        if num_covered and not dry_run and num_covered < len(covered):
            rest = parquet.read().filter(pa.array([not is_covered for is_covered in covered]))
    if rest is not None:
        _replace(filesystem, shard.path, encode_shard(rest))
    elif num_covered and not dry_run:
        _remove(filesystem, shard.path)
    report.shards += 1
    report.records += len(covered)
    report.erased += num_covered
    report.rewritten += 0 < num_covered < len(covered)
    report.deleted += 0 < num_covered == len(covered)


def _covered(keys: Any, erasures: Erasures) -> list[bool]:
    columns: Iterable[Any] = zip(*(keys[name].to_pylist() for name in _KEY_COLUMNS), strict=True)
    return [erasures.cover(request_id, tenant, created) for request_id, tenant, created in columns]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks one of the columns {', '.join(_KEY_COLUMNS)}"
    return error.strerror if isinstance(error, OSError) and error.strerror else "damaged"


def _replace(filesystem: Any, path: str, data: bytes) -> None:
    # The temporary file is named as a shard of this moment: what a crash leaves is stale an hour from now, not at once
    aside = new_shard_name(time.time(), secrets.randbits(12), "sweep", 0).rpartition("/")[2]
    put_whole(filesystem, path, data, temporary=aside + TEMPORARY_SUFFIX)


def _remove(filesystem: Any, path: str) -> None:
    if is_local(filesystem):
        Path(path).unlink()
        sync_directory(Path(path).parent)
    else:
        ask(f"delete {path}", lambda: filesystem.rm_file(path))
