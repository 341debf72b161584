"""`kill -9` while traffic is logged: every finished shard reads, whatever was in the making is named and skipped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from redraft.traffic.reader import TrafficReader

WRITE_FOR_EVER = """
import itertools, sys
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

log = TrafficWriter(sys.argv[1], Observer(), roll_bytes=20_000, max_queue_records=64)
for i in itertools.count():
    log.offer(record(f"r{i}", prompt_token_ids=tuple(range(i % 500))))
    if i % 50 == 0:
        log.flush()
"""

DEADLINE_S = 60.0


def finished_shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.parquet"))


def test_kill_9_leaves_every_finished_shard_readable(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)])
    try:
        deadline = time.monotonic() + DEADLINE_S
        while len(finished_shards(tmp_path)) < 20:
            assert writer.poll() is None, "the writer ended by itself"
            assert time.monotonic() < deadline, "no shards appear"
            time.sleep(0.01)  # polling another process, which has no other way to tell
    finally:
        writer.kill()
    assert writer.wait(10) == -signal.SIGKILL

    shards = finished_shards(tmp_path)
    report = TrafficReader(str(tmp_path)).scan()
    assert report.shards == len(shards) >= 20
    assert {problem.kind for problem in report.problems} <= {"temporary"}
    ids = [int(made.request_id[1:]) for made in TrafficReader(str(tmp_path)).iter_records()]
    assert len(ids) == report.records
    assert ids == sorted(set(ids))

    # A crash of the machine, rather than of the process, may also cut a shard that was already renamed.
    torn = shards[-1]
    torn.write_bytes(torn.read_bytes()[:-100])
    again = TrafficReader(str(tmp_path)).scan()
    assert again.shards == len(shards) - 1
    assert [problem.path for problem in again.problems if problem.kind == "torn"] == [str(torn)]
