"""Reads traffic shards back. One bad file never hides the others: it is skipped and reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from redraft.object_store import StoreUnavailable
from redraft.traffic.erasure import read_erasures
from redraft.traffic.layout import LogFile, list_files, open_root
from redraft.traffic.record import ARROW_SCHEMA, SCHEMA_VERSION, SCHEMA_VERSION_KEY, TrafficRecord
from redraft.traffic.shard import open_shard

logger = logging.getLogger(__name__)

ProblemKind = Literal["torn", "temporary", "foreign", "schema", "invalid_record", "vanished"]

_BATCH_ROWS = 256

_OPTIONAL_COLUMNS = {"domain": ""}
_OPTIONAL_TEACHER_FIELDS = {"sampling_logsumexp": None}
"""Came after the first shards of this schema version were written, and what stands for them there."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file, or rows of it, were not read.

    - `torn`: cut short or damaged; records before the damage may have been read
    - `temporary`: still being written, or left behind by a crash
    - `foreign`: not a name that the writer makes
    - `schema`: written with another schema version, or columns are missing
    - `invalid_record`: sound file, but rows that make no record; `detail` says how many
    - `vanished`: deleted (by retention) between listing and reading
    """

    path: str
    kind: ProblemKind
    detail: str


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a full read of the log found."""

    shards: int
    """Shards read to their end."""
    records: int
    num_bytes: int
    """Size of those shards."""
    problems: tuple[Problem, ...]

    def count(self, kind: ProblemKind) -> int:
        return sum(1 for problem in self.problems if problem.kind == kind)


OnProblem = Callable[[Problem], None]


class TrafficReader:
    """Reads the log at `url`, a directory or any fsspec URL; holds a few hundred records (remotely a shard) at a time.

    Raises ValueError or ImportError for a URL that fsspec cannot open. The reading methods raise OSError only
    if the store cannot be listed, or an object store not read: a shard that did not arrive is not taken for a torn
    one. A missing directory is an empty log.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, self._root = open_root(url)

    def iter_records(
        self, since: float | None = None, until: float | None = None, *, on_problem: OnProblem | None = None
    ) -> Iterator[TrafficRecord]:
        """Records with `since <= created_unix_s < until`, shards oldest first.

        What an erasure on record covers is left out, whatever shard it is in (see `redraft.traffic.erasure`; raises
        its `ErasureUnreadable`). Each problem goes to `on_problem`; without one it is logged. Order within the log
        is that of writing, so `created_unix_s` is only roughly ascending, across replicas too.
        """
        report = _log_problem if on_problem is None else on_problem
        first = float("-inf") if since is None else since
        last = float("inf") if until is None else until
        erased = read_erasures(self._filesystem, self._root)
        for file in self._shards(report):
            # A shard is named after its records were made, so an older shard has nothing to give.
            if file.written_unix_s >= first:
                for record in self._read(file, report, lambda _: None):
                    created = record.created_unix_s
                    if first <= created < last and not erased.cover(record.request_id, record.tenant, created):
                        yield record

    def scan(self) -> ScanReport:
        """Read everything, every page checksum included, and report what is there."""
        problems: list[Problem] = []
        complete: list[LogFile] = []
        records = 0
        for file in self._shards(problems.append):
            records += sum(1 for _ in self._read(file, problems.append, complete.append))
        return ScanReport(len(complete), records, sum(file.num_bytes for file in complete), tuple(problems))

    def _shards(self, report: OnProblem) -> Iterator[LogFile]:
        ours, foreign = list_files(self._filesystem, self._root)
        for path in foreign:
            report(Problem(path, "foreign", "not a shard's name"))
        for file in ours:
            if file.is_temporary:
                report(Problem(file.path, "temporary", "being written, or left by a crash"))
            elif file.schema_version != SCHEMA_VERSION:
                report(Problem(file.path, "schema", f"in a v{file.schema_version} directory"))
            else:
                yield file

    def _read(
        self, file: LogFile, report: OnProblem, on_complete: Callable[[LogFile], None]
    ) -> Iterator[TrafficRecord]:
        bad_rows: Counter[str] = Counter()
        try:
            with open_shard(self._filesystem, file.path) as stream:
                parquet = pq.ParquetFile(stream, page_checksum_verification=True)
                mismatch = _schema_mismatch(parquet.schema_arrow)
                if mismatch is not None:
                    report(Problem(file.path, "schema", mismatch))
                    return
                yield from _records(parquet, bad_rows)
        except FileNotFoundError:
            report(Problem(file.path, "vanished", "deleted while the log was read"))
            return
        except StoreUnavailable:
            raise
        except (pa.ArrowException, OSError, EOFError) as error:
            report(Problem(file.path, "torn", f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            return
        finally:
            if bad_rows:
                kinds = ", ".join(f"{count} {kind}" for kind, count in bad_rows.items())
                report(Problem(file.path, "invalid_record", kinds))
        on_complete(file)


def _records(parquet: Any, bad_rows: Counter[str]) -> Iterator[TrafficRecord]:
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=ARROW_SCHEMA.names):
        for index in range(batch.num_rows):
            row = {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            try:
                yield TrafficRecord.from_row(_completed(row))
            except (ValueError, KeyError, TypeError) as error:
                bad_rows[type(error).__name__] += 1


def _completed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the optional columns that its shard lacks."""
    for position in row["teacher"]:
        for name, value in _OPTIONAL_TEACHER_FIELDS.items():
            position.setdefault(name, value)
    return {**_OPTIONAL_COLUMNS, **row}


def _schema_mismatch(schema: pa.Schema) -> str | None:
    version = (schema.metadata or {}).get(SCHEMA_VERSION_KEY)
    if version is None:
        return "no schema version in the file"
    if version != str(SCHEMA_VERSION).encode():
        return f"schema version {version.decode('ascii', 'replace')[:20]}, not {SCHEMA_VERSION}"
    missing = [name for name in ARROW_SCHEMA.names if name not in schema.names and name not in _OPTIONAL_COLUMNS]
    return f"columns missing: {', '.join(missing)}" if missing else None


def _log_problem(problem: Problem) -> None:
    # A temporary file is normal beside a running writer, and so is a deletion beside retention.
    level = logging.DEBUG if problem.kind in ("temporary", "vanished") else logging.WARNING
    logger.log(level, "traffic file skipped (%s: %s)", problem.kind, problem.detail, extra={"path": problem.path})
