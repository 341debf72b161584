"""New drafts go into service, or back out, and no request can tell."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from redraft.registry.errors import CurrentChanged, DraftWithdrawn, NoPreviousDraft, RegistryUnavailable, WrongTarget
from redraft.registry.manifest import DraftState
from redraft.registry.store import DraftRegistry
from redraft.sampling.params import SamplingParams
from redraft_server.engine.api import EngineEvent, EngineUnavailable, FinishReason
from redraft_server.rollout.fleet import TooManyDrafts
from tests.engine_harness import Collected, request, submit
from tests.rollout_harness import (
    GOOD,
    POOR,
    POOR_TOO,
    Checkpoints,
    Publisher,
    Served,
    remove,
    rollout_config,
    rollout_server,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def url(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def publisher(checkpoints: Checkpoints, url: Path) -> Publisher:
    return Publisher(checkpoints, DraftRegistry(str(url)))


def texts(results: Sequence[Collected]) -> list[list[int]]:
    return [result.token_ids() for result in results]


def plain(checkpoints: Checkpoints, tmp_path: Path, count: int) -> list[list[int]]:
    """What the seeds 0 .. count - 1 give on a server that never swaps anything."""
    with rollout_server(rollout_config(checkpoints, tmp_path / "empty")) as served:
        return texts([r for first in range(0, count, 8) for r in served.traffic(range(first, min(first + 8, count)))])


def test_a_better_draft_goes_through_shadow_and_canary_into_service(
    checkpoints: Checkpoints, url: Path, publisher: Publisher, tmp_path: Path
) -> None:
    old = publisher.publish(POOR)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        assert served.active == old
        seeds = itertools.count()
        results = served.tick_until("idle", seeds)
        new = publisher.publish(GOOD, promised=0.9)
        results += served.tick_until("shadow", seeds)
        assert served.states() == {new: "SHADOW", old: "ACTIVE"}
        assert served.value("redraft_draft_info", draft_version=new, role="candidate") == 1
        results += served.tick_until("canary", seeds)
        shadow = [
            served.value(f"redraft_draft_shadow_expected_acceptance_{part}_total", draft_version=new)
            for part in ("sum", "positions")
        ]
        assert shadow[1] >= 24
        assert shadow[0] == pytest.approx(shadow[1], rel=1e-3)  # the target's twin agrees with it everywhere
        assert served.states() == {new: "CANARY", old: "ACTIVE"}
        assert served.value("redraft_draft_share", draft_version=new) == 0.5
        results += served.tick_until("idle", seeds)
        assert served.active == new
        assert served.states() == {new: "ACTIVE", old: "PREVIOUS"}
        assert served.value("redraft_draft_swaps_total") == 1
        assert served.value("redraft_draft_promised_expected_acceptance", draft_version=new) == 0.9
        assert sum(served.value("redraft_draft_rollbacks_total", reason=r) for r in ("failed", "by_hand")) == 0
        used = {result.finished.speculation.draft_version for result in results}
        last = served.traffic([next(seeds)])
        assert last[0].finished.speculation.draft_version == new
    assert used == {old, new}
    assert texts(results) == plain(checkpoints, tmp_path, len(results))
    current = publisher.registry.current()
    assert current is not None
    assert current.version == new


def test_a_draft_that_passes_offline_and_fails_live_is_rolled_back(
    checkpoints: Checkpoints, url: Path, publisher: Publisher, tmp_path: Path
) -> None:
    old = publisher.publish(GOOD)
    config = rollout_config(checkpoints, url, shadow_positions=0)  # straight into the canary
    with rollout_server(config) as served:
        seeds = itertools.count()
        planted = publisher.publish(POOR, promised=0.4)
        results = served.tick_until("canary", seeds)
        results += served.tick_until("idle", seeds)
        assert len(results) < 150
        assert served.active == old
        assert served.states() == {planted: "ROLLED_BACK", old: "ACTIVE"}
        assert served.value("redraft_draft_rollbacks_total", reason="worse_than_active") == 1
        assert served.value("redraft_draft_share", draft_version=old) == 1.0
        # never again
        results += served.traffic([next(seeds) for _ in range(4)])
        served.rollout.tick()
        assert served.rollout.state == "idle"
        assert {r.finished.speculation.draft_version for r in results[-4:]} == {old}
    assert texts(results) == plain(checkpoints, tmp_path, len(results))
    entry = publisher.registry.get(planted)
    current = publisher.registry.current()
    assert entry.state is DraftState.ROLLED_BACK
    assert "expected acceptance" in entry.reason
    assert current is not None
    assert current.version == old


def test_the_shadow_alone_stops_a_draft_that_is_far_worse(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    old = publisher.publish(GOOD)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        seeds = itertools.count()
        planted = publisher.publish(POOR, make_current=False)
        served.tick_until("shadow", seeds)
        results = served.tick_until("idle", seeds)
        assert {result.finished.speculation.draft_version for result in results} == {old}
        assert served.states()[planted] == "ROLLED_BACK"
    assert "in the shadow" in publisher.registry.get(planted).reason


def test_streams_in_progress_keep_their_draft_over_a_promotion_and_move_at_a_roll_back(
    checkpoints: Checkpoints, url: Path, publisher: Publisher, tmp_path: Path
) -> None:
    first, second = publisher.publish(POOR), publisher.publish(GOOD, make_current=False)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        assert served.active == first
        swaps: list[str] = []
        too_early: list[Collected] = []

        def during(step: int, results: list[Collected]) -> None:
            if step == 3:
                served.rollout.activate(second)
                swaps.append(second)
            elif step == 6:
                served.rollout.rollback()
                swaps.append(first)
                too_early.extend(result for result in results[2:] if result.done.is_set())

        results = _stream_with_actions(served, during)
        assert swaps == [second, first]
        assert served.active == first
        served.rollout.tick()
        assert served.states() == {second: "ROLLED_BACK", first: "ACTIVE"}
        # streams of the first draft never noticed; those of the second were moved, if they had not ended
        assert {r.finished.speculation.draft_version for r in results if r not in too_early} == {first}
    with rollout_server(rollout_config(checkpoints, tmp_path / "empty")) as served:
        assert texts(results) == texts(_stream_with_actions(served, lambda step, results: None))


class Started(Collected):
    """Tells when the first text has come."""

    def __init__(self) -> None:
        super().__init__()
        self.first = threading.Event()

    def __call__(self, events: list[EngineEvent]) -> None:
        super().__call__(events)
        self.first.set()


def _stream_with_actions(served: Served, during: Callable[[int, list[Collected]], None]) -> list[Collected]:
    """Six long requests, of which three begin later; `during(step, those so far)` between, from the test's thread."""
    results: list[Collected] = []
    for step in range(9):
        during(step, results)
        if step % 3 != 2:
            params = SamplingParams(temperature=0.8, seed=100 + step)
            started = Started()
            results.append(submit(served.engine, request((5, 6, 7, 40 + step), params, 80), started))
            assert started.first.wait(60)
    return [result.wait() for result in results]


def test_split_by_hand_holds_against_the_registry_until_somebody_activates(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    a, b = publisher.publish(POOR), publisher.publish(POOR_TOO, make_current=False)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        views = served.rollout.split({a: 0.5, b: 0.5})
        assert {view.version: (view.state.value, view.share) for view in views} == {
            a: ("ACTIVE", 0.5),
            b: ("CANARY", 0.5),
        }
        used = {r.finished.speculation.draft_version for r in served.traffic(range(16))}
        assert used == {a, b}
        publisher.publish(GOOD)
        for _ in range(3):
            served.rollout.tick()
        assert served.rollout.state == "manual"
        swap = served.rollout.activate(b, expected=a)
        assert swap.active.version == b
        assert swap.previous is not None
        assert swap.previous.version == a
        assert served.rollout.state == "idle"
        assert {r.finished.speculation.draft_version for r in served.traffic(range(8))} == {b}


def test_two_swaps_in_a_row_and_back_again(checkpoints: Checkpoints, url: Path, publisher: Publisher) -> None:
    a = publisher.publish(POOR)
    b, c = (publisher.publish(seed, make_current=False) for seed in (POOR_TOO, GOOD))
    with rollout_server(rollout_config(checkpoints, url)) as served:
        served.rollout.activate(b)
        served.rollout.activate(c)
        assert served.active == c
        served.rollout.rollback(expected=c)
        assert served.active == b
        with pytest.raises(CurrentChanged):
            served.rollout.rollback(expected=c)
        served.rollout.rollback()
        assert served.active == a
        with pytest.raises(NoPreviousDraft):
            served.rollout.rollback()
        assert served.active == a
        with pytest.raises(DraftWithdrawn):
            served.rollout.activate(c)
        assert served.value("redraft_draft_swaps_total") == 4
        served.traffic(range(4))


def test_a_draft_for_another_target_or_with_lying_hashes_is_refused_here(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    old = publisher.publish(POOR)
    foreign = publisher.publish(GOOD, make_current=False, target_fingerprint="sha256:" + "0" * 64)
    liar = publisher.publish(POOR_TOO, make_current=False)
    with next(url.rglob(f"{liar}/model.safetensors")).open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\x01" * 8)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        with pytest.raises(WrongTarget):
            served.rollout.activate(foreign)
        for _ in range(3):
            served.rollout.tick()
        states = {view.version: view for view in served.rollout.views()}
        assert states[liar].state.value == "REFUSED"
        assert "model.safetensors" in states[liar].reason
        assert served.active == old
        assert served.rollout.state == "idle"
        assert served.value("redraft_registry_errors_total", operation="load") == 1
        served.traffic(range(4))
    assert publisher.registry.get(liar).state is DraftState.PUBLISHED  # another server may see it whole


def test_a_broken_current_draft_at_the_start_gives_way_to_the_one_before(
    checkpoints: Checkpoints, url: Path, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    old, broken = publisher.publish(POOR), publisher.publish(GOOD)
    publisher.registry.activate(broken)
    next(url.rglob(f"{broken}/model.safetensors")).write_bytes(b"nothing")
    with rollout_server(rollout_config(checkpoints, url)) as served:
        assert served.active == old
        assert f"cannot start with draft {broken}" in caplog.text
        for _ in range(2):
            served.rollout.tick()
        assert served.states() == {broken: "REFUSED", old: "ACTIVE"}


def test_a_restart_serves_no_draft_that_nobody_has_tried(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    old, new = publisher.publish(POOR), publisher.publish(GOOD)
    config = rollout_config(checkpoints, url)
    with rollout_server(config) as served:
        assert served.active == old
        served.tick_until("shadow", itertools.count())
    with rollout_server(config) as served:
        assert served.active == old
        seeds = itertools.count()
        served.tick_until("shadow", seeds)
        served.tick_until("idle", seeds)
        assert served.active == new
    with rollout_server(config) as served:
        assert served.active == new
        served.rollout.tick()
        assert served.rollout.state == "idle"


def test_the_registry_vanishes_and_nobody_notices(checkpoints: Checkpoints, url: Path, publisher: Publisher) -> None:
    old, other = publisher.publish(POOR), publisher.publish(GOOD, make_current=False)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        seeds = itertools.count()
        served.tick_until("canary", seeds)
        remove(url)
        served.tick_until("idle", seeds)  # the trial ends without it
        assert served.active == other
        assert served.value("redraft_registry_errors_total", operation="current") > 0
        assert served.value("redraft_registry_errors_total", operation="confirm") == 1
        assert served.states() == {other: "ACTIVE", old: "PREVIOUS"}  # from what is in memory
        with pytest.raises(RegistryUnavailable):
            served.rollout.activate("v17")


def test_the_registry_learns_of_a_roll_back_when_it_is_there_again(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    publisher.publish(GOOD)
    planted = publisher.publish(POOR, make_current=False)
    with rollout_server(rollout_config(checkpoints, url, shadow_positions=0)) as served:
        seeds = itertools.count()
        served.tick_until("canary", seeds)
        away = url.rename(url.with_name("away"))
        served.tick_until("idle", seeds)
        assert served.value("redraft_registry_errors_total", operation="roll_back") >= 1
        away.rename(url)
        for _ in range(20):
            served.rollout.tick()
    assert publisher.registry.get(planted).state is DraftState.ROLLED_BACK


def test_a_roll_back_elsewhere_ends_the_trial_here(checkpoints: Checkpoints, url: Path, publisher: Publisher) -> None:
    old, new = publisher.publish(POOR), publisher.publish(POOR_TOO, make_current=False)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        served.tick_until("canary", itertools.count())
        publisher.registry.mark_rolled_back(new, "another replica")
        served.rollout.tick()
        assert served.rollout.state == "idle"
        assert served.active == old
        assert served.value("redraft_draft_rollbacks_total", reason="elsewhere") == 1
        assert {r.finished.speculation.draft_version for r in served.traffic(range(8))} == {old}


def test_memory_is_bounded_and_given_back(checkpoints: Checkpoints, url: Path, publisher: Publisher) -> None:
    versions = [publisher.publish(seed, make_current=False) for seed in (POOR, POOR_TOO, GOOD, 13)]
    with rollout_server(rollout_config(checkpoints, url, max_resident_drafts=2)) as served:
        assert served.active == ""  # an empty CURRENT: decoding goes on without a draft
        served.traffic(range(2))
        for version in versions:
            served.rollout.activate(version)
            assert len(served.rollout._fleet.versions) <= 2
        with pytest.raises(TooManyDrafts):
            served.rollout.split(dict.fromkeys(versions[:3], 1 / 3))
        served.traffic(range(2))


def test_a_drain_in_the_middle_of_a_canary_ends_every_request_well(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    publisher.publish(POOR)
    publisher.publish(POOR_TOO, make_current=False)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        served.tick_until("canary", itertools.count())
        served.rollout.start()
        params = [SamplingParams(temperature=0.8, seed=seed) for seed in range(6)]
        running = [submit(served.engine, request((5, 6, 7), p, 60)) for p in params]
        served.rollout.stop(60)
        served.engine.drain()
        results = [one.wait() for one in running]
        assert {result.finish_reason() for result in results} == {FinishReason.LENGTH}
        with pytest.raises(EngineUnavailable):
            served.rollout.submit(lambda: None).result(60)


def test_commands_that_wait_for_a_rollout_that_ends_are_told(
    checkpoints: Checkpoints, url: Path, publisher: Publisher
) -> None:
    version = publisher.publish(POOR)
    with rollout_server(rollout_config(checkpoints, url)) as served:
        rollout = served.rollout
        first = rollout.submit(lambda: rollout.activate(version))
        rollout.start()
        assert first.result(60).active.version == version
        served.engine.stop(60)
        with pytest.raises(EngineUnavailable):  # serving a split needs the engine
            rollout.submit(lambda: rollout.split({version: 1.0})).result(60)
        rollout.stop(60)
