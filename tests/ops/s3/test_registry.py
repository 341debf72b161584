"""The draft registry in S3: one of several publishers wins, and an outage is nothing that a request would notice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from redraft.registry import storage
from redraft.registry.errors import DraftNotFound, RegistryUnavailable
from redraft.registry.names import move_name
from redraft.registry.store import DraftRegistry
from redraft.registry.watcher import MAX_BACK_OFF_S, CurrentMoved, RegistryPoller
from tests.integration.test_registry_processes import RACE, run
from tests.ops.s3.conftest import Bucket
from tests.rollout_harness import GOOD, POOR, Checkpoints, Publisher, Served, rollout_config, rollout_server
from tests.unit.registry.fakes import Drafts


def test_of_racing_publishers_exactly_one_wins_each_round(bucket: Bucket, tmp_path: Path) -> None:
    """Processes, as two trainers are. Each round both saw the same draft as current, and both publish."""
    num_workers, num_rounds = 2, 8
    url = bucket.url("drafts")
    outcomes = run(RACE, url, tmp_path / "made", num_workers, num_rounds)
    winners = {round: worker for round, worker, result, _ in outcomes if result == "won"}
    assert sum(result == "won" for _, _, result, _ in outcomes) == num_rounds == len(winners)
    registry = DraftRegistry(url)
    current = registry.current()
    assert current is not None
    assert current.generation == num_rounds
    assert current.version == f"r{num_rounds - 1:03d}-w{winners[num_rounds - 1]}"
    assert len(registry.versions()) == num_rounds * num_workers  # the loser's draft is stored all the same
    assert bucket.keys("drafts/moves") == [Path(move_name(n)).name for n in range(1, num_rounds + 1)]


def test_a_move_whose_reply_was_lost_is_made_once(bucket: Bucket, tmp_path: Path) -> None:
    """The second try is refused by the first one's object, which the registry recognises as its own."""
    registry = DraftRegistry(bucket.url("drafts"))
    Drafts(registry, tmp_path).publish("v1")
    bucket.proxy.lose_reply_to(b"PUT /" + f"{bucket.name}/drafts/{move_name(2)}".encode())
    lost = bucket.proxy.num_lost
    current = registry.pin()
    assert bucket.proxy.num_lost == lost + 1
    assert (current.generation, current.pinned) == (2, True)
    assert registry.current() == current


def test_a_draft_survives_a_short_break_while_it_is_fetched(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", 1000)
    registry = DraftRegistry(bucket.url("drafts"))
    manifest = Drafts(registry, tmp_path / "made").publish("v1")
    assert manifest.files["model.safetensors"].bytes == 3000
    bucket.proxy.lose_reply_to(b"bytes=1000-1999")  # the second of three pieces
    lost = bucket.proxy.num_lost
    fetched = registry.fetch("v1", tmp_path / "out")
    assert bucket.proxy.num_lost == lost + 1
    assert (fetched / "model.safetensors").read_bytes() == b"v1" * 1500
    registry.verify("v1")


def test_a_bucket_that_does_not_exist_is_no_empty_registry(bucket: Bucket, tmp_path: Path) -> None:
    registry = DraftRegistry("s3://no-such-bucket/drafts")
    with pytest.raises(RegistryUnavailable, match=r"s3://no-such-bucket/drafts: the bucket does not exist$"):
        registry.current()
    with pytest.raises(RegistryUnavailable, match="the bucket does not exist"):
        Drafts(registry, tmp_path).publish("v1")
    assert DraftRegistry(bucket.url("drafts")).current() is None  # that is one


def test_polls_become_rare_in_an_outage_and_frequent_after_it(bucket: Bucket, tmp_path: Path) -> None:
    registry = DraftRegistry(bucket.url("drafts"))
    Drafts(registry, tmp_path).publish("v1")
    poller = RegistryPoller(registry, poll_s=10.0)
    first = poller.poll()
    assert [type(change) for change in first.changes] == [CurrentMoved]
    assert first.next_poll_s == 10.0
    bucket.proxy.down()
    polls = [poller.poll() for _ in range(5)]
    assert [poll.next_poll_s for poll in polls] == [20.0, 40.0, 80.0, MAX_BACK_OFF_S, MAX_BACK_OFF_S]
    assert all(isinstance(error, RegistryUnavailable) for poll in polls for error in poll.errors)
    assert all(poll.errors for poll in polls)
    bucket.proxy.up()
    Drafts(DraftRegistry(bucket.url("drafts")), tmp_path).publish("v2")
    back = poller.poll()
    assert (back.errors, back.next_poll_s) == ((), 10.0)
    assert [change.current.version for change in back.changes if isinstance(change, CurrentMoved)] == ["v2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def errors(served: Served) -> float:
    return served.value("redraft_registry_errors_total", operation="current")


def test_a_server_serves_through_an_outage_and_takes_the_next_draft_after_it(
    bucket: Bucket, checkpoints: Checkpoints
) -> None:
    url = bucket.url("drafts")
    publisher = Publisher(checkpoints, DraftRegistry(url))
    old = publisher.publish(POOR)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        served.rollout.tick()
        assert (served.active, errors(served)) == (old, 0)
        for bring_down in (bucket.proxy.down, bucket.remove):
            before = errors(served)
            bring_down()
            for _ in range(3):
                served.rollout.tick()
                served.traffic(range(4))  # every request ends as it should
            assert served.active == old
            assert errors(served) > before
            assert [view.version for view in served.rollout.views()] == [old]
            bucket.proxy.up()
        with pytest.raises(RegistryUnavailable):
            publisher.registry.current()
        # somebody makes the bucket again, and the next run of the trainer publishes into it
        bucket.remake()
        new = Publisher(checkpoints, DraftRegistry(url), itertools.count(1)).publish(GOOD, promised=0.9)
        seeds = itertools.count()
        served.tick_until("shadow", seeds)
        served.tick_until("idle", seeds)
        assert served.active == new


def test_a_server_starts_while_the_registry_is_away(bucket: Bucket, checkpoints: Checkpoints) -> None:
    url = bucket.url("drafts")
    version = Publisher(checkpoints, DraftRegistry(url)).publish(GOOD)
    bucket.proxy.down()
    with rollout_server(rollout_config(checkpoints, url, shadow_positions=0, canary_share=0.0)) as served:
        served.traffic(range(2))
        assert served.active == ""
        bucket.proxy.up()
        seeds = itertools.count()
        served.tick_until("idle", seeds)
        served.tick_until("idle", seeds)
        assert served.active == version
    with pytest.raises(DraftNotFound):
        DraftRegistry(url).get("never-published")
