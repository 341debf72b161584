"""What is in a log, from three columns of each shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from redraft.object_store import StoreUnavailable
from redraft.traffic.erasure import read_erasures
from redraft.traffic.layout import list_files, open_root
from redraft.traffic.shard import open_shard
from redraft.traffic.sweep import OnShard


@dataclass(slots=True)
class LogStats:
    """Of the shards that could be read."""

    shards: int = 0
    num_bytes: int = 0
    tenants: Counter[str] = field(default_factory=Counter)
    """Records of each."""
    oldest_unix_s: float = float("inf")
    newest_unix_s: float = float("-inf")
    """When the first and the last record were finished."""
    erased: int = 0
    """Records that an erasure covers and the next sweep will take out; counted above too."""
    unreadable: int = 0
    """Shards that are damaged, or of another schema."""
    unfinished: int = 0
    """Temporary files."""
    foreign: int = 0
    """Files that are not ours."""


def log_stats(url: str, *, on_shard: OnShard = lambda done, total: None) -> LogStats:
    """Read the log at `url`. Raises as `redraft.traffic.sweep.sweep` does, and OSError if an object store fails."""
    filesystem, root = open_root(url)
    erasures = read_erasures(filesystem, root)
    files, foreign = list_files(filesystem, root)
    shards = [file for file in files if not file.is_temporary]
    stats = LogStats(unfinished=len(files) - len(shards), foreign=len(foreign))
    for done, shard in enumerate(shards, start=1):
        try:
            with open_shard(filesystem, shard.path) as stream:
                keys = pq.read_table(stream, columns=["request_id", "tenant", "created_unix_s"]).to_pylist()
            stats.erased += sum(erasures.cover(**key) for key in keys)
        except FileNotFoundError:
            pass  # deleted meanwhile
        except StoreUnavailable:
            raise
        except (pa.ArrowException, OSError, EOFError, TypeError):
            stats.unreadable += 1
        else:
            stats.shards += 1
            stats.num_bytes += shard.num_bytes
            stats.tenants.update(key["tenant"] for key in keys)
            times = [key["created_unix_s"] for key in keys]
            stats.oldest_unix_s = min([stats.oldest_unix_s, *times])
            stats.newest_unix_s = max([stats.newest_unix_s, *times])
        on_shard(done, len(shards))
    return stats
