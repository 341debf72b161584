"""The traffic log in S3: whole objects or none, however the network, the store or the server behaves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from redraft import object_store
from redraft.errors import ConfigError
from redraft.object_store import StoreUnavailable, open_url, upload
from redraft.traffic.reader import TrafficReader
from redraft.traffic.retention import apply_retention
from redraft.traffic.spool import Spool
from redraft.traffic.writer import TrafficWriter
from redraft_server import traffic_log
from redraft_server.config import TrafficLogConfig
from redraft_server.traffic_log import TrafficLog
from scripts.s3_process import S3Process, environment
from tests.ops.charts import require
from tests.ops.s3.conftest import Bucket
from tests.unit.traffic.fakes import Observer, record

SHORT_WAITS = (0.001, 0.01)
MIB = 2**20


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_log, "RETRY_WAITS_S", SHORT_WAITS)


def open_log(bucket: Bucket, spool: Path, observer: Observer) -> TrafficLog:
    url = bucket.url("traffic")
    return TrafficLog(url, TrafficLogConfig(url=url, spool_dir=spool, roll_bytes=1024, roll_seconds=3600.0), observer)


def offer(log: TrafficLog, *request_ids: str) -> None:
    for request_id in request_ids:
        assert log.writer.offer(record(request_id))
    assert log.writer.flush(20)


async def test_records_arrive_and_old_ones_are_deleted(bucket: Bucket, tmp_path: Path) -> None:
    observer = Observer()
    log = open_log(bucket, tmp_path, observer)
    wanted = [f"r{i:02}" for i in range(20)]
    offer(log, *wanted)
    await log.close()
    assert bucket.logged() == wanted
    assert observer.results == {"written": 20}
    num_shards = len(observer.shards)
    assert num_shards == len(bucket.keys("traffic/v1")) > 1
    bucket.proxy.down()
    with pytest.raises(StoreUnavailable):
        apply_retention(bucket.url("traffic"), max_age_s=1.0, max_bytes=None, now=4e9)
    bucket.proxy.up()
    # the probe of the start is no shard, and stays
    report = apply_retention(bucket.url("traffic"), max_age_s=1.0, max_bytes=None, now=4e9)
    assert (len(report.deleted_shards), report.remaining_bytes, report.failed) == (num_shards, 0, ())
    assert bucket.keys("traffic") == [".writable"]


def test_a_large_file_goes_up_in_parts(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MIB)  # S3 takes no smaller ones
    content = os.urandom(11 * MIB)
    source = tmp_path / "large"
    source.write_bytes(content)
    filesystem, root = open_url(bucket.url("files"))
    upload(filesystem, source, f"{root}/large")
    upload(filesystem, content[: 6 * MIB], f"{root}/small")
    assert bucket.admin.cat_file(f"{root}/large") == content
    assert bucket.admin.info(f"{root}/large")["ETag"].endswith('-3"')  # S3's mark of an object of three parts
    assert "-" not in bucket.admin.info(f"{root}/small")["ETag"]


def test_a_bucket_that_does_not_exist_ends_the_start(bucket: Bucket, tmp_path: Path) -> None:
    url = "s3://no-such-bucket/traffic"
    with pytest.raises(ConfigError, match=r"^traffic_log\.url: .*no-such-bucket/traffic: the bucket does not exist$"):
        TrafficLog(url, TrafficLogConfig(url=url, spool_dir=tmp_path), Observer())


@pytest.mark.usefixtures("other_environment")
def test_no_credentials_end_the_start(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"^traffic_log\.url: .*no credentials were found"):
        open_log(bucket, tmp_path, Observer())


@pytest.mark.usefixtures("other_environment")
def test_wrong_credentials_end_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of its own, which looks at credentials and knows none."""
    with S3Process(require("moto_server").with_name("python"), unchecked_requests=0) as strict:
        for name, value in environment(strict.port).items():
            monkeypatch.setenv(name, value)
        url = "s3://guarded/traffic"
        with pytest.raises(
            ConfigError, match=r"cannot write to guarded/traffic: access denied \(.*Access Key Id"
        ) as caught:
            TrafficLog(url, TrafficLogConfig(url=url, spool_dir=tmp_path), Observer())
        assert environment(0)["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


async def test_a_store_that_is_away_at_the_start_is_no_reason_not_to_start(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.proxy.down()
    observer = Observer()
    log = open_log(bucket, tmp_path, observer)
    assert f"traffic shards will wait in {tmp_path}: the store cannot be reached" in caplog.text
    offer(log, "a", "b")
    assert observer.wait_for_failures(1)
    bucket.proxy.up()
    assert log.spool is not None
    assert log.spool.flush(20)
    await log.close()
    assert bucket.logged() == ["a", "b"]


async def test_a_bucket_that_vanishes_and_comes_back_costs_nothing(bucket: Bucket, tmp_path: Path) -> None:
    observer = Observer()
    log = open_log(bucket, tmp_path, observer)
    offer(log, "before")
    assert log.spool is not None
    assert log.spool.flush(20)
    lost = bucket.logged()
    bucket.remove()
    offer(log, "during")
    assert observer.wait_for_failures(2)
    assert not log.spool.flush(0)
    bucket.remake()
    assert log.spool.flush(20)
    await log.close()
    assert (lost, bucket.logged()) == (["before"], ["during"])
    assert observer.results == {"written": 2}


WRITE_ONE_SHARD = """
import sys
from pathlib import Path
from redraft.traffic.spool import Spool
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

spool = Spool(Path(sys.argv[1]), sys.argv[2], Observer(), max_bytes=2**30)
log = TrafficWriter(spool, Observer())
for i in range(200):
    log.offer(record(f"r{i:03}", prompt_token_ids=tuple((j * j * i) % 50_000 for j in range(2000))))
log.flush()
spool.flush()
"""


def test_kill_9_in_the_middle_of_an_upload_leaves_nothing_half(bucket: Bucket, tmp_path: Path) -> None:
    bucket.proxy.stall(after_bytes=100_000)
    server = subprocess.Popen([sys.executable, "-c", WRITE_ONE_SHARD, str(tmp_path), bucket.url("traffic")])
    try:
        assert bucket.proxy.stalled.wait(60), "nothing was uploaded"
    finally:
        server.kill()
    assert server.wait(10) == -signal.SIGKILL
    (waiting,) = tmp_path.rglob("*.parquet")
    assert waiting.stat().st_size > 100_000  # so it was cut off in the middle
    bucket.proxy.down()
    bucket.proxy.up()
    assert bucket.logged() == []
    assert bucket.keys("traffic") == []

    spool = Spool(tmp_path, bucket.url("traffic"), Observer(), max_bytes=2**30, retry_waits_s=SHORT_WAITS)
    assert spool.flush(20)
    assert spool.close(20) == 0
    assert bucket.logged() == [f"r{i:03}" for i in range(200)]
    assert bucket.keys("traffic") == [str(waiting.relative_to(tmp_path))]


def test_killed_after_the_upload_sends_the_same_object_again(bucket: Bucket, tmp_path: Path) -> None:
    observer = Observer()
    spool = Spool(tmp_path / "a", bucket.url("traffic"), observer, max_bytes=2**30, retry_waits_s=SHORT_WAITS)
    log = TrafficWriter(spool, observer)
    log.offer(record("once"))
    assert log.close(20)
    assert spool.close(20) == 0
    (key,) = bucket.keys("traffic")
    again = tmp_path / "b" / key  # as if it had died before it could delete the file
    again.parent.mkdir(parents=True)
    again.write_bytes(bucket.admin.cat_file(f"{bucket.name}/traffic/{key}"))
    spool = Spool(tmp_path / "b", bucket.url("traffic"), observer, max_bytes=2**30, retry_waits_s=SHORT_WAITS)
    assert spool.flush(20)
    assert spool.close(20) == 0
    assert bucket.logged() == ["once"]


def test_a_broken_connection_is_not_taken_for_a_torn_shard(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, bucket.url("traffic"), Observer(), max_bytes=2**30, retry_waits_s=SHORT_WAITS)
    log = TrafficWriter(spool, Observer())
    for name in ("a", "b"):
        log.offer(record(name))
        assert log.flush(20)
    assert log.close(20)
    assert spool.close(20) == 0
    records = TrafficReader(bucket.url("traffic")).iter_records()
    assert next(records).request_id == "a"
    bucket.proxy.down()
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreUnavailable, match=r"cannot read .*: the store cannot be"):
        next(records)
    assert "skipped" not in caplog.text
    with pytest.raises(StoreUnavailable, match="cannot list"):
        TrafficReader(bucket.url("traffic")).scan()
    bucket.proxy.up()
    assert bucket.logged() == ["a", "b"]
    bucket.remove()
    with pytest.raises(StoreUnavailable, match="the bucket does not exist"):
        TrafficReader(bucket.url("traffic")).scan()  # an empty log would be the wrong answer
