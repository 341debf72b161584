"""Bad files are skipped and named; good ones are read whatever lies beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redraft.traffic.layout import new_shard_name
from redraft.traffic.reader import Problem, TrafficReader
from redraft.traffic.record import ARROW_SCHEMA, SCHEMA_VERSION_KEY, TrafficRecord
from tests.unit.traffic.fakes import record

NOW = 1_795_527_000.0
HOUR = 3600.0


def write(root: Path, *records: TrafficRecord, at: float = NOW) -> Path:
    table = pa.Table.from_pylist([made.to_row() for made in records], schema=ARROW_SCHEMA)
    return write_table(root, table, at)


def write_table(root: Path, table: pa.Table, at: float = NOW) -> Path:
    path = root / new_shard_name(at, 0, "host", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")
    return path


def read(root: Path, **bounds: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Request ids, and (file name, kind) of each problem."""
    problems: list[Problem] = []
    ids = [made.request_id for made in TrafficReader(str(root)).iter_records(**bounds, on_problem=problems.append)]
    return ids, [(Path(problem.path).name, problem.kind) for problem in problems]


def test_shards_come_oldest_first(tmp_path: Path) -> None:
    write(tmp_path, record("late"), at=NOW + 30 * HOUR)
    write(tmp_path, record("first"), record("second"))
    write(tmp_path, record("third"), at=NOW + HOUR)
    assert read(tmp_path) == (["first", "second", "third", "late"], [])


def test_a_log_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == ([], [])
    assert TrafficReader(str(tmp_path / "none")).scan().records == 0


def test_since_and_until_are_half_open(tmp_path: Path) -> None:
    for hour in range(4):
        created = NOW + hour * HOUR
        write(tmp_path, record(f"r{hour}", created_unix_s=created), at=created + 60)
    assert read(tmp_path, since=NOW + HOUR, until=NOW + 3 * HOUR)[0] == ["r1", "r2"]
    assert read(tmp_path, until=NOW)[0] == []
    assert read(tmp_path, since=NOW + 3 * HOUR)[0] == ["r3"]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_torn_shard_is_reported_and_the_others_are_read(tmp_path: Path, keep: float) -> None:
    write(tmp_path, record("before"))
    torn = write(tmp_path, *[record(f"torn{i}") for i in range(50)], at=NOW + HOUR)
    write(tmp_path, record("after"), at=NOW + 2 * HOUR)
    data = torn.read_bytes()
    torn.write_bytes(data[: int(len(data) * keep)])

    assert read(tmp_path) == (["before", "after"], [(torn.name, "torn")])
    report = TrafficReader(str(tmp_path)).scan()
    assert (report.shards, report.records, report.count("torn")) == (2, 2, 1)
    assert report.num_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.parquet") if p != torn)
    assert report.problems[0].detail


def test_a_flipped_byte_in_a_page_is_damage(tmp_path: Path) -> None:
    shard = write(tmp_path, *[record(f"r{i}") for i in range(50)])
    data = bytearray(shard.read_bytes())
    # Past the page header (a few dozen bytes), inside the last id column's data.
    column = pq.read_metadata(shard).row_group(0).column(9)
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 0x40
    shard.write_bytes(data)

    assert TrafficReader(str(tmp_path)).scan().count("torn") == 1


def test_temporary_and_foreign_files_are_named(tmp_path: Path) -> None:
    shard = write(tmp_path, record("r0"))
    unfinished = shard.with_name(shard.name + ".tmp")
    unfinished.write_bytes(b"PAR1")
    (tmp_path / "README").write_text("not ours")
    (shard.parent / "table.parquet").write_bytes(shard.read_bytes())

    ids, problems = read(tmp_path)
    assert ids == ["r0"]
    assert sorted(problems) == sorted(
        [("README", "foreign"), ("table.parquet", "foreign"), (unfinished.name, "temporary")]
    )


def test_another_schema_version_is_refused_by_file_and_by_directory(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([record().to_row()], schema=ARROW_SCHEMA)
    newer = write_table(tmp_path, table.replace_schema_metadata({SCHEMA_VERSION_KEY: b"2"}))
    bare = write_table(tmp_path, table.replace_schema_metadata(None))
    short = write_table(tmp_path, table.drop_columns(["tenant"]))
    elsewhere = tmp_path / str(write(tmp_path, record()).relative_to(tmp_path)).replace("v1/", "v2/")
    elsewhere.parent.mkdir(parents=True)
    pq.write_table(table, elsewhere)

    ids, problems = read(tmp_path)
    assert ids == ["r0"]
    assert sorted(problems) == sorted((path.name, "schema") for path in (newer, bare, short, elsewhere))
    details = {problem.detail for problem in TrafficReader(str(tmp_path)).scan().problems}
    assert "schema version 2, not 1" in details
    assert "columns missing: tenant" in details


def test_columns_of_a_later_writer_are_ignored(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([record().to_row()], schema=ARROW_SCHEMA)
    write_table(tmp_path, table.append_column("later", pa.array([1])))
    assert list(TrafficReader(str(tmp_path)).iter_records()) == [record()]


def test_columns_that_came_later_may_be_missing(tmp_path: Path) -> None:
    """A shard from before `domain` and `sampling_logsumexp` is still a shard of version 1."""
    table = pa.Table.from_pylist([record(domain="sql").to_row()], schema=ARROW_SCHEMA).drop_columns(["domain"])
    teacher = ARROW_SCHEMA.field("teacher").type.value_type
    old = pa.list_(pa.struct([field for field in teacher if field.name != "sampling_logsumexp"]))
    rows = [
        [{name: value for name, value in p.items() if name != "sampling_logsumexp"} for p in row]
        for row in table.column("teacher").to_pylist()
    ]
    place = table.schema.get_field_index("teacher")
    write_table(tmp_path, table.set_column(place, pa.field("teacher", old, nullable=False), pa.array(rows, old)))
    assert read(tmp_path)[1] == []
    (found,) = TrafficReader(str(tmp_path)).iter_records()
    assert (found.domain, {p.sampling_logsumexp for p in found.teacher}) == ("", {None})
    assert found == record()


def test_a_row_that_makes_no_record_is_counted(tmp_path: Path) -> None:
    good, bad = record("good").to_row(), record("bad").to_row()
    bad["steps"][0]["num_accepted"] = 99
    shard = write_table(tmp_path, pa.Table.from_pylist([bad, good, bad], schema=ARROW_SCHEMA))
    assert read(tmp_path) == (["good"], [(shard.name, "invalid_record")])
    report = TrafficReader(str(tmp_path)).scan()
    assert (report.shards, report.records, report.problems[0].detail) == (1, 1, "2 ValueError")


def test_a_shard_deleted_meanwhile_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, record("r0"))
    gone = write(tmp_path, record("r1"), at=NOW + HOUR)
    problems: list[Problem] = []
    reading = TrafficReader(str(tmp_path)).iter_records(on_problem=problems.append)
    assert next(reading).request_id == "r0"
    gone.unlink()
    assert list(reading) == []
    assert [problem.kind for problem in problems] == ["vanished"]


def test_problems_are_logged_when_nobody_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, record()).write_bytes(b"")
    with caplog.at_level(logging.INFO):
        assert list(TrafficReader(str(tmp_path)).iter_records()) == []
    (line,) = caplog.messages
    assert line.startswith("traffic file skipped (torn")
