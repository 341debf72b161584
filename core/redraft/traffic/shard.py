"""A shard's bytes: Parquet as every shard of the log has it, and where to read it from."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redraft.object_store import ask, is_local

ROWS_PER_GROUP = 256


def encode_shard(table: Any) -> bytes:
    """A table of records as the content of one shard."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression="zstd",
        write_page_checksum=True,  # lets a reader tell a damaged shard from a sound one
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def open_shard(filesystem: Any, path: str) -> Any:
    """A stream of a shard's bytes.

    A remote shard is fetched whole: one request, tried again if need be, instead of several for each column. Raises
    FileNotFoundError, and `StoreUnavailable` or another OSError.
    """
    if is_local(filesystem):
        return filesystem.open(path, "rb")
    return io.BytesIO(ask(f"read {path}", lambda: filesystem.cat_file(path)))
