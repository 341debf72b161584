"""Deletion and expiry in a real object store, as an operator runs them."""

from __future__ import annotations

import time

import pytest
from typer.testing import CliRunner

from redraft.object_store import StoreUnavailable
from redraft.traffic.erasure import Erasure
from redraft.traffic.sweep import erase, sweep
from redraft.traffic.writer import TrafficWriter
from redraft_training.__main__ import app
from tests.ops.s3.conftest import Bucket
from tests.unit.traffic.fakes import Observer, record

DAY = 86_400.0


def fill(bucket: Bucket) -> None:
    """Five shards of ten records, from five to one days old; every second one is acme's."""
    for age in range(5, 0, -1):
        written = time.time() - age * DAY
        log = TrafficWriter(bucket.url("traffic"), Observer(), clock=lambda written=written: written)  # type: ignore[misc]
        for i in range(10):
            tenant = "acme" if i % 2 else "other"
            log.offer(record(f"r{age}-{i}", tenant=tenant, created_unix_s=written))
        assert log.close(60)


def traffic(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["traffic", *arguments])
    return result.exit_code, result.stdout


def test_a_tenant_is_deleted_and_old_traffic_expires(bucket: Bucket) -> None:
    fill(bucket)
    names = bucket.keys("traffic/v1")
    url = bucket.url("traffic")
    assert traffic("delete", "--traffic", url, "--tenant", "acme", "--dry-run")[1].startswith("would delete 25 of 50")
    assert len(bucket.logged()) == 50
    status, said = traffic("delete", "--traffic", url, "--tenant", "acme", "--request-id", "r3-0")
    assert (status, said.startswith("deleted 26 of 50 records in 5 shards: 5 shards written anew")) == (0, True)
    assert bucket.keys("traffic/v1") == names
    assert bucket.logged() == [f"r{age}-{i}" for age in range(1, 6) for i in (0, 2, 4, 6, 8) if (age, i) != (3, 0)]
    status, said = traffic("expire", "--traffic", url, "--days", "2.5")
    assert (status, said.startswith("deleted 3 shards")) == (0, True)
    assert bucket.logged() == [f"r{age}-{i}" for age in (1, 2) for i in (0, 2, 4, 6, 8)]


def test_a_store_that_goes_away_half_way_loses_nothing(bucket: Bucket) -> None:
    fill(bucket)

    def outage(done: int, total: int) -> None:
        if done == 2:
            bucket.proxy.down()

    with pytest.raises(StoreUnavailable):
        erase(bucket.url("traffic"), Erasure(time.time(), tenants=frozenset({"acme"})), on_shard=outage)
    bucket.proxy.up()
    kept = sorted(f"r{age}-{i}" for age in range(1, 6) for i in (0, 2, 4, 6, 8))
    assert bucket.logged() == kept  # nothing of the others is lost, and nothing of acme is read
    assert sweep(bucket.url("traffic")).erased == 15  # the two shards that were done already had the other ten
    assert bucket.logged() == kept
