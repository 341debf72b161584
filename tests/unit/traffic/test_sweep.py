"""A sweep takes out what was asked for and nothing else, whenever it is killed and whoever works beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redraft.traffic import sweep as module
from redraft.traffic.erasure import Erasure
from redraft.traffic.layout import list_files, new_shard_name, open_root
from redraft.traffic.reader import TrafficReader
from redraft.traffic.record import ARROW_SCHEMA, TrafficRecord
from redraft.traffic.retention import apply_retention
from redraft.traffic.shard import encode_shard
from redraft.traffic.store import put_whole
from redraft.traffic.sweep import count, erase, sweep
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

NOW = 1_795_527_000.0
HOUR = 3600.0
GONE = Erasure(NOW + 9 * HOUR, request_ids=frozenset({"gone"}))


@pytest.fixture(params=["local", "memory"], name="url")
def _url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "log") if request.param == "local" else f"memory://{uuid4().hex}"


def write(url: str, *records: TrafficRecord, at: float = NOW) -> str:
    """One shard; its path."""
    filesystem, root = open_root(url)
    path = f"{root}/{new_shard_name(at, 0, 'host', 1)}"
    put_whole(filesystem, path, encode_shard(table(*records)))
    return path


def table(*records: TrafficRecord) -> Any:
    return pa.Table.from_pylist([made.to_row() for made in records], schema=ARROW_SCHEMA)


def three_shards(url: str) -> list[str]:
    """With and without what is to go, and one with nothing else."""
    return [
        write(url, record("a"), record("gone"), record("b")),
        write(url, record("c"), record("d"), at=NOW + HOUR),
        write(url, record("gone", sample_index=1), record("gone", sample_index=2), at=NOW + 2 * HOUR),
        write(url, record("gone", sample_index=3), record("e"), at=NOW + 3 * HOUR),
    ]


def stored(url: str) -> list[str]:
    """Request ids that are physically there, in order."""
    filesystem, root = open_root(url)
    files = [file for file in list_files(filesystem, root)[0] if not file.is_temporary]
    return [name for file in files for name in pq.read_table(filesystem.open(file.path))["request_id"].to_pylist()]


def contents(url: str) -> dict[str, bytes]:
    filesystem, root = open_root(url)
    return {path: filesystem.cat_file(path) for path in filesystem.find(root)}


def test_a_request_goes_from_every_shard_and_nothing_else_does(url: str) -> None:
    paths = three_shards(url)
    before = {r.request_id: r for r in TrafficReader(url).iter_records() if r.request_id != "gone"}
    untouched = contents(url)[paths[1]]
    report = erase(url, GONE)
    assert (report.shards, report.records, report.erased) == (4, 9, 4)
    assert (report.rewritten, report.deleted, report.failed) == (2, 1, {})
    assert stored(url) == ["a", "b", "c", "d", "e"]
    assert {r.request_id: r for r in TrafficReader(url).iter_records()} == before
    files = contents(url)
    assert files.keys() & set(paths) == {paths[0], paths[1], paths[3]}  # under their own names
    assert files[paths[1]] == untouched
    assert TrafficReader(url).scan().problems == ()


def test_again_there_is_nothing_to_do(url: str) -> None:
    three_shards(url)
    erase(url, GONE)
    swept = contents(url)
    assert sweep(url).erased == 0
    assert contents(url) == swept
    again = erase(url, GONE)
    assert (again.erased, again.rewritten, again.deleted) == (0, 0, 0)


def test_a_dry_run_counts_and_leaves_everything_as_it_is(url: str) -> None:
    three_shards(url)
    before = contents(url)
    report = count(url, GONE)
    assert (report.erased, report.rewritten, report.deleted) == (4, 2, 1)
    assert contents(url) == before


def test_by_tenant_and_by_time(url: str) -> None:
    write(
        url,
        record("a", tenant="acme", created_unix_s=NOW - 2),
        record("b", tenant="acme", created_unix_s=NOW),
        record("c", created_unix_s=NOW - 2),
        record("d", created_unix_s=NOW),
    )
    assert erase(url, Erasure(NOW - 1, tenants=frozenset({"acme"}))).erased == 1
    assert stored(url) == ["b", "c", "d"]
    assert erase(url, Erasure(NOW, frozenset({"d"}), frozenset({"acme"}))).erased == 0
    assert erase(url, Erasure(NOW)).erased == 1  # everybody's
    assert stored(url) == ["b", "d"]
    assert erase(url, Erasure(NOW + 1, frozenset({"d"}), frozenset({"acme"}))).deleted == 1
    assert stored(url) == []


def test_a_log_that_does_not_exist_is_empty(url: str) -> None:
    assert count(url, GONE).shards == 0
    assert sweep(url).shards == 0


def test_columns_and_rows_that_this_version_does_not_understand_survive(url: str) -> None:
    filesystem, root = open_root(url)
    rows = table(record("a"), record("gone"), record("bad")).append_column("later", pa.array([1, 2, 3]))
    path = f"{root}/{new_shard_name(NOW, 0, 'host', 1).replace('v1/', 'v2/')}"
    put_whole(filesystem, path, encode_shard(rows))
    assert erase(url, GONE).erased == 1
    kept = pq.read_table(filesystem.open(path))
    assert (kept["later"].to_pylist(), kept["request_id"].to_pylist()) == ([1, 3], ["a", "bad"])
    assert kept.schema == rows.schema


def test_a_damaged_shard_is_named_left_alone_and_protects_no_other(url: str) -> None:
    paths = three_shards(url)
    filesystem, root = open_root(url)
    torn = contents(url)[paths[0]][:-9]
    filesystem.pipe_file(paths[0], torn)
    strange = write(url, record("a"), at=NOW + 5 * HOUR)
    put_whole(filesystem, strange, encode_shard(table(record("a")).drop_columns(["tenant"])), temporary="x")
    filesystem.pipe_file(f"{root}/notes.txt", b"not ours")
    report = erase(url, GONE)
    reason = "lacks one of the columns request_id, tenant, created_unix_s"
    assert report.failed == {paths[0]: "damaged", strange: reason}
    assert (report.erased, report.foreign) == (3, 1)
    assert contents(url)[paths[0]] == torn


def test_pages_are_checked_before_a_shard_is_written_anew(tmp_path: Path) -> None:
    path = write(str(tmp_path), *[record(f"r{i}") for i in range(50)], record("gone"))
    data = bytearray(Path(path).read_bytes())
    column = pq.read_metadata(path).row_group(0).column(11)  # a list of token ids
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 0x40
    Path(path).write_bytes(data)
    assert erase(str(tmp_path), GONE).failed.keys() == {path}
    assert Path(path).read_bytes() == data


class Killed(BaseException):
    """No handler for errors stops it, as none stops a signal."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], bool]:
    """Make the `step`-th of the calls that change a disk the last one of this process; says whether it came to that."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Killed
            if calls > step:  # a dead process cleans nothing up
                raise OSError("dead")
            return real(*args, **kwargs)

        return call

    for name in ("open", "fsync", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return lambda: calls >= step


def test_killed_at_any_point_no_other_record_is_lost_and_none_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, was_killed = 0, True
    while was_killed:
        step += 1
        url = str(tmp_path / str(step))
        write(url, record("a"), record("gone"), record("b"))
        write(url, record("gone"), at=NOW + HOUR)
        with monkeypatch.context() as patch:
            came_to_it = kill_at(patch, step)
            with suppress(Killed):
                erase(url, GONE)
            was_killed = came_to_it()
        assert [name for name in stored(url) if name != "gone"] == ["a", "b"]
        visible = [r.request_id for r in TrafficReader(url).iter_records(on_problem=lambda _: None)]
        asked = any((Path(url) / "erasures").glob("*.json"))
        assert ("gone" in visible) != asked  # hidden as soon as it is on record
        if asked:
            sweep(url)  # any later one completes it
            assert stored(url) == ["a", "b"]
            assert [r.request_id for r in TrafficReader(url).iter_records(on_problem=lambda _: None)] == ["a", "b"]
    assert step == 14  # five calls for each of two files that are written, three for one that is deleted, and no more


def test_what_a_kill_leaves_is_private_and_goes_with_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path)
    write(url, record("a"), record("gone"))
    with monkeypatch.context() as patch:
        kill_at(patch, 7)  # the erasure takes five; then a temporary file is opened, and not yet synced
        with pytest.raises(Killed):
            erase(url, GONE)
    (left,) = tmp_path.rglob("*.parquet.tmp")
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert sweep(url).unfinished == 1
    (file,) = (f for f in list_files(*open_root(url))[0] if f.is_temporary)
    apply_retention(url, None, None, file.written_unix_s + HOUR - 60)
    assert left.exists()  # it may belong to a sweep that is at work
    apply_retention(url, None, None, file.written_unix_s + HOUR + 60)
    assert not left.exists()


def test_what_an_old_crash_left_goes_with_a_sweep(tmp_path: Path) -> None:
    left = Path(write(str(tmp_path), record("gone")))
    left.rename(left.with_name(left.name + ".tmp"))  # its name is of long ago
    assert erase(str(tmp_path), GONE).unfinished == 1
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_shard_that_a_server_writes_later_is_swept_next_time(url: str) -> None:
    three_shards(url)
    erase(url, GONE)
    write(url, record("late"), record("gone", created_unix_s=NOW), at=NOW + 10 * HOUR)
    assert "gone" not in [r.request_id for r in TrafficReader(url).iter_records()]
    report = sweep(url)
    assert (report.erased, report.rewritten) == (1, 1)
    assert stored(url)[-1] == "late"


def test_shards_too_young_for_any_erasure_are_not_read(url: str) -> None:
    three_shards(url)
    erase(url, GONE)
    write(url, record("new"), at=GONE.before_unix_s + 25 * HOUR)
    assert sweep(url).shards == 3
    assert stored(url)[-1] == "new"


def test_a_server_writes_on_meanwhile(url: str) -> None:
    three_shards(url)
    log = TrafficWriter(url, Observer(), clock=lambda: NOW)

    def serve(done: int, total: int) -> None:
        log.offer(record(f"during {done}"))
        assert log.flush(20)

    erase(url, GONE, on_shard=serve)
    assert log.close(20)
    assert sorted(stored(url)) == ["a", "b", "c", "d", *(f"during {n}" for n in (1, 2, 3, 4)), "e"]


def test_two_sweeps_at_a_time_bring_nothing_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has read the shard; the second erases from it another record; the first writes what it had read."""
    write(url, record("a"), record("gone"), record("gone too"))
    replace = module._replace

    def replace_late(filesystem: Any, path: str, data: bytes) -> None:
        monkeypatch.setattr(module, "_replace", replace)
        erase(url, Erasure(GONE.before_unix_s, frozenset({"gone too"})))
        assert stored(url) == ["a"]
        replace(filesystem, path, data)
        assert stored(url) == ["a", "gone too"]

    monkeypatch.setattr(module, "_replace", replace_late)
    erase(url, GONE)
    assert stored(url) == ["a"]


def test_a_shard_that_retention_deletes_meanwhile_is_no_failure(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = three_shards(url)
    filesystem, _ = open_root(url)

    def retention(done: int, total: int) -> None:
        if done == 1:
            filesystem.rm_file(paths[3])

    report = erase(url, GONE, on_shard=retention)
    assert (report.failed, report.shards) == ({}, 3)


def test_rewritten_shards_stay_private(tmp_path: Path) -> None:
    paths = three_shards(str(tmp_path))
    erase(str(tmp_path), GONE)
    for path in (paths[0], paths[3]):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
