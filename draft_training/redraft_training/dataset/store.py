"""Data sets on disk: examples as Parquet, written whole or not at all.

A saved data set is what a training run reads again after it was killed: the log has moved on by then.

    dataset/training.parquet  dataset/held_out.parquet  dataset/report.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from redraft.files import atomic_directory
from redraft.traffic.store import put_whole
from redraft_training.dataset.columns import SCHEMA, from_batch, to_batch
from redraft_training.dataset.errors import DatasetUnreadable
from redraft_training.dataset.example import Example
from redraft_training.dataset.read import Dataset, DatasetReport
from redraft_training.dataset.select import TargetIdentity

FORMAT_VERSION = 1
_META_KEY = b"redraft.examples"
_ROWS_PER_GROUP = 256


def save_dataset(directory: Path, dataset: Dataset, identity: TargetIdentity) -> None:
    """Write a data set to a directory that is new or empty; it appears in one rename.

    Raises FileExistsError if there is something already, OSError if it cannot be written.
    """
    with atomic_directory(directory) as temporary:
        write_examples(temporary / "training.parquet", dataset.training, identity)
        write_examples(temporary / "held_out.parquet", dataset.held_out, identity)
        (temporary / "report.json").write_text(json.dumps(dataset.report.to_json(), indent=2) + "\n", "utf-8")
    for path in directory.iterdir():
        path.chmod(0o600)  # token ids decode to what users wrote


def load_dataset(directory: Path, identity: TargetIdentity) -> Dataset:
    """Read a data set that `save_dataset` wrote. Raises DatasetUnreadable."""
    try:
        report = DatasetReport.from_json(json.loads((directory / "report.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetUnreadable(f"{directory} holds no data set of ours: {type(error).__name__}") from error
    training, _ = read_examples(directory / "training.parquet", identity)
    held_out, _ = read_examples(directory / "held_out.parquet", identity)
    return Dataset(tuple(training), tuple(held_out), report)


def write_examples(
    path: Path, examples: Sequence[Example], identity: TargetIdentity, state: Mapping[str, Any] | None = None
) -> None:
    """Write examples to one file, atomically and readable by the owner only. `state`: JSON values kept beside them."""
    meta = {
        "format_version": FORMAT_VERSION,
        "target_fingerprint": identity.target_fingerprint,
        "tokenizer_fingerprint": identity.tokenizer_fingerprint,
        "state": dict(state or {}),
    }
    groups = [to_batch(examples[first : first + _ROWS_PER_GROUP]) for first in range(0, len(examples), _ROWS_PER_GROUP)]
    table = pa.Table.from_batches(groups, schema=SCHEMA).replace_schema_metadata({_META_KEY: json.dumps(meta)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP, write_page_checksum=True)
    put_whole(LocalFileSystem(), str(path), sink.getvalue().to_pybytes())


def read_examples(path: Path, identity: TargetIdentity) -> tuple[list[Example], dict[str, Any]]:
    """Examples of a file, and the state beside them.

    Raises DatasetUnreadable when it is missing or damaged, has another format, or is of another target or vocabulary.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            meta = json.loads((parquet.schema_arrow.metadata or {})[_META_KEY])
            if meta["format_version"] != FORMAT_VERSION:
                raise DatasetUnreadable(
                    f"{path} has format {meta['format_version']}, and {FORMAT_VERSION} is read here"
                )
            own = (meta["target_fingerprint"], meta["tokenizer_fingerprint"])
            if own != (identity.target_fingerprint, identity.tokenizer_fingerprint):
                raise DatasetUnreadable(f"{path} is of another target or vocabulary: delete it, or give that target")
            examples = [
                example
                for batch in parquet.iter_batches(batch_size=_ROWS_PER_GROUP, columns=SCHEMA.names)
                for example in from_batch(batch)
            ]
    except (OSError, EOFError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError) as error:
        raise DatasetUnreadable(
            f"{path} is not a file of examples, or damaged ({type(error).__name__}): delete it to start afresh"
        ) from error
    return examples, dict(meta["state"])
