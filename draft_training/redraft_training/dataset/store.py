"""Data sets on disk: examples as Parquet, written whole or not at all.

A saved data set is what a training run reads again after it was killed: the log has moved on by then.

    dataset/training.parquet  dataset/held_out.parquet  dataset/report.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from redraft.files import atomic_directory
from redraft.traffic.erasure import Erasures
from redraft.traffic.layout import TEMPORARY_SUFFIX
from redraft.traffic.store import put_whole
from redraft_training.dataset.columns import SCHEMA, from_batch, to_batch
from redraft_training.dataset.errors import DatasetUnreadable
from redraft_training.dataset.example import Example
from redraft_training.dataset.read import Dataset, DatasetReport, ids_hash, shares, time_order
from redraft_training.dataset.select import TargetIdentity

FORMAT_VERSION = 1
TRAINING, HELD_OUT, REPORT = "training.parquet", "held_out.parquet", "report.json"
_META_KEY = b"redraft.examples"
_ROWS_PER_GROUP = 256


def save_dataset(directory: Path, dataset: Dataset, identity: TargetIdentity) -> None:
    """Write a data set to a directory that is new or empty; it appears in one rename.

    Raises FileExistsError if there is something already, OSError if it cannot be written.
    """
    with atomic_directory(directory, private=True) as temporary:  # token ids decode to what users wrote
        write_examples(temporary / TRAINING, dataset.training, identity)
        write_examples(temporary / HELD_OUT, dataset.held_out, identity)
        (temporary / REPORT).write_bytes(_report_bytes(dataset.report))


def load_dataset(directory: Path, identity: TargetIdentity) -> Dataset:
    """Read a data set that `save_dataset` wrote. Raises DatasetUnreadable."""
    try:
        report = DatasetReport.from_json(json.loads((directory / REPORT).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetUnreadable(f"{directory} holds no data set of ours: {type(error).__name__}") from error
    training, _ = read_examples(directory / TRAINING, identity)
    held_out, _ = read_examples(directory / HELD_OUT, identity)
    return Dataset(tuple(training), tuple(held_out), report)


def erase_dataset(directory: Path, erasures: Erasures) -> int:
    """Take out of a saved data set what the erasures cover; return how many examples that were, of none, none.

    Each file is replaced whole. Raises OSError and DatasetUnreadable.
    """
    count = num_covered(directory, erasures)
    if count:
        identity = stored_identity(directory / TRAINING)
        dataset = load_dataset(directory, identity)
        training, held_out = without(dataset.training, erasures), without(dataset.held_out, erasures)
        ordered = sorted((*training, *held_out), key=time_order)
        watermark = replace(dataset.report.watermark, num_examples=len(ordered), sha256=ids_hash(ordered))
        report = replace(dataset.report, training=shares(training), held_out=shares(held_out), watermark=watermark)
        _put_private(directory / REPORT, _report_bytes(report))
        write_examples(directory / TRAINING, training, identity)
        write_examples(directory / HELD_OUT, held_out, identity)
    return count


def num_covered(directory: Path, erasures: Erasures) -> int:
    """How many examples of a saved data set the erasures cover; of none, none. Raises DatasetUnreadable."""
    count = 0
    for path in (directory / TRAINING, directory / HELD_OUT):
        try:
            keys = pq.read_table(path, columns=["request_id", "tenant", "created_unix_s"]).to_pylist()
        except FileNotFoundError:
            continue
        except (OSError, pa.ArrowException) as error:
            raise DatasetUnreadable(f"{path} cannot be searched for what has to be erased: delete it") from error
        count += sum(erasures.cover(**key) for key in keys)
    return count


def without(examples: Iterable[Example], erasures: Erasures) -> tuple[Example, ...]:
    """The examples that no erasure covers."""
    return tuple(e for e in examples if not erasures.cover(e.request_id, e.tenant, e.created_unix_s))


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
    _put_private(path, sink.getvalue().to_pybytes())


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


def stored_identity(path: Path) -> TargetIdentity:
    """Whose examples a file holds; the size of the vocabulary is not kept, and 0. Raises DatasetUnreadable."""
    try:
        meta = json.loads(pq.read_schema(path).metadata[_META_KEY])
        return TargetIdentity(meta["target_fingerprint"], meta["tokenizer_fingerprint"], 0)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DatasetUnreadable(f"{path} is not a file of examples, or damaged: delete it") from error


def _report_bytes(report: DatasetReport) -> bytes:
    return (json.dumps(report.to_json(), indent=2) + "\n").encode()


def _put_private(path: Path, data: bytes) -> None:
    # Left by a write that was killed, it would be in the way, and nobody would ever erase what is in it
    path.with_name(path.name + TEMPORARY_SUFFIX).unlink(missing_ok=True)
    put_whole(LocalFileSystem(), str(path), data)
