"""What an erasure covers, and that everything that reads the log knows of it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.traffic.erasure import Erasure, Erasures, ErasureUnreadable, erasures_of, keep_erasure
from redraft.traffic.layout import open_root
from redraft.traffic.reader import TrafficReader
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

NOW = 1_795_527_000.0
names = st.sampled_from(["a", "b", "c"])
erasures = st.builds(Erasure, st.floats(0, 10), st.frozensets(names, max_size=2), st.frozensets(names, max_size=2))


def covers(erasure: Erasure, request_id: str, tenant: str, created: float) -> bool:
    """The definition, word for word."""
    everybody = not erasure.request_ids and not erasure.tenants
    is_meant = everybody or request_id in erasure.request_ids or tenant in erasure.tenants
    return is_meant and created < erasure.before_unix_s


@given(st.lists(erasures, max_size=4), names, names, st.floats(0, 10))
def test_together_they_cover_what_one_of_them_covers(
    asked: list[Erasure], request_id: str, tenant: str, created: float
) -> None:
    together = Erasures(asked)
    assert together.cover(request_id, tenant, created) == any(covers(e, request_id, tenant, created) for e in asked)
    assert bool(together) == bool(asked)
    assert not together.cover(request_id, tenant, together.newest_unix_s)


@given(erasures)
def test_an_erasure_comes_back_from_json(erasure: Erasure) -> None:
    assert Erasure.from_json(erasure.to_json()) == erasure


@pytest.mark.parametrize("url", ["{}", "memory://erasures{}"])
def test_readers_leave_out_what_is_covered_also_in_later_shards(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path / "log")
    assert not erasures_of(url)
    keep_erasure(*open_root(url), Erasure(NOW, frozenset({"gone"}), frozenset({"acme"})))
    log = TrafficWriter(url, Observer())
    for made in (
        record("gone", created_unix_s=NOW - 1),
        record("gone", created_unix_s=NOW),  # a new request of the same name
        record("other", created_unix_s=NOW - 1),
        record("of acme", tenant="acme", created_unix_s=NOW - 1),
    ):
        log.offer(made)
    assert log.close(20)
    reader = TrafficReader(url)
    found = [(r.request_id, r.created_unix_s) for r in reader.iter_records(on_problem=lambda p: pytest.fail(str(p)))]
    assert found == [("gone", NOW), ("other", NOW - 1)]
    assert reader.scan().records == 4  # what is physically there


def test_erasures_are_private_and_no_foreign_files(tmp_path: Path) -> None:
    keep_erasure(*open_root(str(tmp_path)), Erasure(NOW, frozenset({"r"})))
    (path,) = (tmp_path / "erasures").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert TrafficReader(str(tmp_path)).scan().problems == ()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[]"),
        b'{"schema_version": 2, "before_unix_s": 1, "request_ids": [], "tenants": []}',
        b'{"schema_version": 1, "before_unix_s": 1, "request_ids": [1], "tenants": []}',
    ],
)
def test_nothing_is_read_past_an_erasure_that_is_not_understood(tmp_path: Path, content: bytes) -> None:
    log = TrafficWriter(str(tmp_path), Observer())
    log.offer(record())
    assert log.close(20)
    (tmp_path / "erasures").mkdir()
    (tmp_path / "erasures" / "1.json").write_bytes(content)
    with pytest.raises(ErasureUnreadable, match=r"1\.json"):
        next(TrafficReader(str(tmp_path)).iter_records())
