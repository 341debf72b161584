"""What retention deletes, and what it must not touch."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from redraft.traffic.layout import new_shard_name
from redraft.traffic.retention import apply_retention

NOW = 1_795_527_000.0
DAY = 86400.0


def shard(root: Path, days_old: float, size: int = 100, suffix: str = "") -> str:
    path = root / (new_shard_name(NOW - days_old * DAY, 0, "host", 1) + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return str(path)


def left(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*") if path.is_file()}


def test_age(tmp_path: Path) -> None:
    old, older, young = shard(tmp_path, 31), shard(tmp_path, 400), shard(tmp_path, 29)
    report = apply_retention(str(tmp_path), 30 * DAY, None, NOW)
    assert report.deleted_shards == (older, old)
    assert report.remaining_bytes == 100
    assert left(tmp_path) == {young}


def test_size_takes_the_oldest_and_no_more_than_needed(tmp_path: Path) -> None:
    paths = [shard(tmp_path, days) for days in (5, 4, 3, 2, 1)]
    report = apply_retention(str(tmp_path), None, 250, NOW)
    assert report.deleted_shards == tuple(paths[:3])
    assert report.remaining_bytes == 200
    assert apply_retention(str(tmp_path), None, 200, NOW).deleted_shards == ()


def test_both_limits_and_none(tmp_path: Path) -> None:
    paths = [shard(tmp_path, days) for days in (40, 3, 2, 1)]
    assert apply_retention(str(tmp_path), None, None, NOW).deleted_shards == ()
    assert apply_retention(str(tmp_path), 30 * DAY, 200, NOW).deleted_shards == tuple(paths[:2])
    assert apply_retention(str(tmp_path / "none"), 1.0, 0, NOW).remaining_bytes == 0


def test_only_stale_temporary_files_and_nothing_foreign(tmp_path: Path) -> None:
    stale, fresh = shard(tmp_path, 1, suffix=".tmp"), shard(tmp_path, 0.01, suffix=".tmp")
    foreign = tmp_path / "v1" / "notes.parquet"
    foreign.write_text("keep")
    report = apply_retention(str(tmp_path), 0.0, 0, NOW)
    assert (report.deleted_shards, report.deleted_temporary) == ((), (stale,))
    assert left(tmp_path) == {fresh, str(foreign)}


def test_one_file_that_cannot_be_deleted_protects_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, gone, normal = (shard(tmp_path, days) for days in (50, 49, 48))
    delete = LocalFileSystem.rm_file

    def rm_file(filesystem: LocalFileSystem, path: str) -> None:
        if path == stuck:
            raise PermissionError(path)
        delete(filesystem, path)
        if path == gone:
            raise FileNotFoundError(path)  # as if another retention had been faster

    monkeypatch.setattr(LocalFileSystem, "rm_file", rm_file)
    report = apply_retention(str(tmp_path), 30 * DAY, None, NOW)
    assert (report.deleted_shards, report.failed) == ((normal,), (stuck,))
    assert report.remaining_bytes == 100
    assert left(tmp_path) == {stuck}


def test_a_store_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take half a minute to fail, and the server may want to end meanwhile."""
    paths = [shard(tmp_path, days) for days in (33, 32, 31)]
    asked: list[str] = []

    def away(self: LocalFileSystem, path: str) -> None:
        asked.append(path)
        raise TimeoutError

    monkeypatch.setattr(LocalFileSystem, "rm_file", away)
    report = apply_retention(str(tmp_path), 30 * DAY, None, NOW)
    assert asked == paths[:1]
    assert report.failed == tuple(paths)
    assert report.remaining_bytes == 300
