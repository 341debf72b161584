"""`redraft-train traffic` from outside: what it says, what it does, and how it ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from redraft.traffic.reader import TrafficReader
from redraft.traffic.record import TrafficRecord
from redraft.traffic.writer import TrafficWriter
from redraft_training.__main__ import app
from redraft_training.commands.common import Exit
from tests.unit.traffic.fakes import Observer, record

DAY = 86_400.0


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["traffic", *arguments], terminal_width=200)
    return result.exit_code, result.stdout, result.stderr.replace("\n", " ")


def write(root: Path, *records: TrafficRecord, days_ago: float = 0.0) -> None:
    written = time.time() - days_ago * DAY
    log = TrafficWriter(str(root), Observer(), clock=lambda: written)
    for made in records:
        assert log.offer(made)
    assert log.close(20)


def finished(request_id: str, days_ago: float, tenant: str = "t") -> TrafficRecord:
    return record(request_id, tenant=tenant, created_unix_s=time.time() - days_ago * DAY)


def ids(root: Path) -> list[str]:
    return [r.request_id for r in TrafficReader(str(root)).iter_records(on_problem=lambda _: None)]


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    root = tmp_path / "traffic"
    write(root, finished("a", 40), finished("b", 40, "acme"), days_ago=40)
    write(root, finished("c", 2), finished("d", 2, "acme"), finished("e", 2, ""), days_ago=2)
    return root


def test_delete_says_what_it_did_and_what_is_left_to_do(root: Path) -> None:
    status, stdout, stderr = call("delete", "--traffic", str(root), "--request-id", "a", "--tenant", "acme")
    assert (status, stdout) == (0, "deleted 3 of 5 records in 2 shards: 1 shards written anew, 1 deleted\n")
    assert "traffic_log.roll_seconds" in stderr
    assert ids(root) == ["c", "e"]
    assert call("delete", "--traffic", str(root), "--request-id", "a")[1].startswith("deleted 0 of 2 records")


def test_a_dry_run_changes_nothing(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status, stdout, _ = call("delete", "--traffic", str(root), "--tenant", "acme", "--dry-run")
    assert (status, stdout.split(" records")[0]) == (0, "would delete 2 of 5")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_before_narrows_or_stands_alone(root: Path) -> None:
    day = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 20 * DAY))
    assert call("delete", "--traffic", str(root), "--tenant", "acme", "--before", day)[0] == 0
    assert ids(root) == ["a", "c", "d", "e"]
    assert call("delete", "--traffic", str(root), "--before", day)[0] == 0
    assert ids(root) == ["c", "d", "e"]
    assert call("delete", "--traffic", str(root), "--tenant", "")[0] == 0
    assert ids(root) == ["c", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delete"], "say what to delete"),
        (["delete", "--before", "yesterday"], "expected a date such as"),
        (["delete", "--before", "2999-01-01"], "lies in the future"),
        (["delete", "--request-id", "a", "--traffic", "{}x"], "there is no such directory"),
        (["expire", "--days", "1", "--traffic", "{}x"], "there is no such directory"),
        (["stats", "--traffic", "nosuch://bucket"], "nosuch"),
        (["delete", "--tenant", "t", "--traffic", "nosuch://bucket"], "cannot use --traffic"),
        (["expire", "--days", "-1"], "days"),
        (["expire"], "--days"),
    ],
)
def test_wrong_usage_ends_with_2_and_touches_nothing(root: Path, arguments: list[str], message: str) -> None:
    arguments = [part.format(root) for part in arguments]
    if "--traffic" not in arguments:
        arguments += ["--traffic", str(root)]
    status, _, stderr = call(*arguments)
    assert (status, message in stderr) == (Exit.USAGE, True)
    assert ids(root) == ["a", "b", "c", "d", "e"]
    assert sorted(path.name for path in root.parent.iterdir()) == ["traffic"]
    assert [path.name for path in root.iterdir()] == ["v1"]


def test_a_shard_that_cannot_be_searched_is_named_and_ends_with_1(root: Path) -> None:
    torn = min(root.rglob("*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-5])
    status, stdout, stderr = call("delete", "--traffic", str(root), "--tenant", "acme")
    assert (status, stdout.split(" records")[0]) == (Exit.ERROR, "deleted 1 of 3")
    assert "may still hold records of it (damaged)" in stderr
    assert torn.name in stderr.replace(" ", "")


def test_expire_deletes_what_is_old_and_what_came_late(root: Path) -> None:
    call("delete", "--traffic", str(root), "--request-id", "late")
    write(root, finished("late", 1), finished("f", 1))
    status, stdout, _ = call("expire", "--traffic", str(root), "--days", "30")
    assert status == 0
    assert stdout.startswith("deleted 1 shards older than 30 days; 0.0 MB are left\ndeleted 1 of ")
    assert ids(root) == ["c", "d", "e", "f"]
    assert call("expire", "--traffic", str(root), "--days", "30")[1].startswith("deleted 0 shards")


def test_stats_count_by_tenant(root: Path) -> None:
    (root / "notes.txt").write_text("not ours")
    call("delete", "--traffic", str(root), "--request-id", "late")
    write(root, finished("late", 1))
    status, stdout, stderr = call("stats", "--traffic", str(root))
    assert status == 0
    assert "3 shards" in stdout
    rows = {tuple(part.strip() for part in line.split("│")[1:3]) for line in stdout.splitlines() if "│" in line}
    assert rows == {("t", "3"), ("acme", "2"), ("(none)", "1")}
    assert "1 of them are to go" in stderr
    assert "1 files are not of the log" in stderr
