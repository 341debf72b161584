"""Each change once, in whatever order replicas and outages arrange them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from redraft.registry.errors import CorruptDraft, RegistryUnavailable
from redraft.registry.manifest import DraftEntry
from redraft.registry.pointer import Current
from redraft.registry.store import DraftRegistry
from redraft.registry.watcher import (
    MAX_BACK_OFF_S,
    Change,
    CurrentMoved,
    DraftPublished,
    DraftRolledBack,
    RegistryPoller,
    RegistryWatcher,
)
from tests.unit.registry.fakes import Drafts


@pytest.fixture
def url(memory_url: str) -> str:  # the poller does not know what it looks at
    return memory_url


@pytest.fixture
def poller(registry: DraftRegistry) -> RegistryPoller:
    return RegistryPoller(registry, 10.0)


def news(poller: RegistryPoller) -> list[tuple[str, str]]:
    poll = poller.poll()
    assert poll.errors == ()
    assert poll.next_poll_s == 10.0
    return [brief(change) for change in poll.changes]


def brief(change: Change) -> tuple[str, str]:
    if isinstance(change, CurrentMoved):
        return "current", change.current.version + (" pinned" if change.current.pinned else "")
    return {DraftPublished: "published", DraftRolledBack: "rolled back"}[type(change)], change.entry.version


def test_each_change_once(drafts: Drafts, poller: RegistryPoller) -> None:
    registry = drafts.registry
    assert news(poller) == []
    drafts.publish("v1")
    assert news(poller) == [("current", "v1")]
    assert news(poller) == []
    drafts.publish("v2", make_current=False)
    drafts.refuse("r1")
    assert news(poller) == [("published", "v2")]
    registry.activate("v2")
    assert news(poller) == [("current", "v2")]
    registry.pin()
    assert news(poller) == [("current", "v2 pinned")]
    registry.unpin()
    assert news(poller) == [("current", "v2")]
    registry.rollback(reason="slow")
    assert news(poller) == [("current", "v1"), ("rolled back", "v2")]
    assert news(poller) == []


def test_a_roll_back_of_the_candidate_or_the_current_draft_is_news(drafts: Drafts, poller: RegistryPoller) -> None:
    drafts.publish("v1")
    drafts.publish("v2", make_current=False)
    news(poller)
    drafts.registry.mark_rolled_back("v2", "degraded")
    assert news(poller) == [("rolled back", "v2")]
    drafts.registry.mark_rolled_back("v1", "degraded")
    assert news(poller) == [("rolled back", "v1")]
    assert news(poller) == []


def test_the_first_look_tells_what_matters_now(drafts: Drafts, registry: DraftRegistry) -> None:
    drafts.publish("v1", make_current=False)
    drafts.publish("v2")
    assert news(RegistryPoller(registry, 10.0)) == [("current", "v2")]  # v1 is older: no candidate
    drafts.publish("v3", make_current=False)
    drafts.publish("v4", make_current=False)
    assert news(RegistryPoller(registry, 10.0)) == [("current", "v2"), ("published", "v4")]
    registry.mark_rolled_back("v4", "x")
    registry.mark_rolled_back("v2", "x")
    assert news(RegistryPoller(registry, 10.0)) == [("current", "v2"), ("published", "v3"), ("rolled back", "v2")]


def test_a_prune_or_a_fence_is_no_news(drafts: Drafts, poller: RegistryPoller) -> None:
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    drafts.registry.activate("v3")
    news(poller)
    assert drafts.registry.prune(0) == ("v1",)
    assert news(poller) == []


def test_a_damaged_draft_is_reported_once_and_does_not_hide_others(drafts: Drafts, poller: RegistryPoller) -> None:
    drafts.publish("v1")
    news(poller)
    drafts.publish("v2", make_current=False)
    drafts.publish("v3", make_current=False)
    drafts.registry._storage.put("drafts/v2/manifest.json", b"{}")
    poll = poller.poll()
    assert [brief(change) for change in poll.changes] == [("published", "v3")]
    assert [type(error) for error in poll.errors] == [CorruptDraft]
    assert poll.next_poll_s == 10.0
    assert news(poller) == []


class Flaky:
    """A registry that is away for a while, from a chosen call on."""

    def __init__(self, registry: DraftRegistry) -> None:
        self._registry = registry
        self.failing: set[str] = set()

    def current(self) -> Current | None:
        self._fail("current")
        return self._registry.current()

    def versions(self) -> tuple[str, ...]:
        self._fail("versions")
        return self._registry.versions()

    def get(self, version: str) -> DraftEntry:
        self._fail("get")
        return self._registry.get(version)

    def _fail(self, name: str) -> None:
        if name in self.failing:
            raise RegistryUnavailable("away")


@pytest.mark.parametrize("call", ["current", "versions", "get"])
def test_an_outage_loses_and_repeats_nothing(drafts: Drafts, registry: DraftRegistry, call: str) -> None:
    flaky = Flaky(registry)
    poller = RegistryPoller(flaky, 10.0)
    drafts.publish("v1")
    seen = news(poller)
    drafts.publish("v2")
    drafts.publish("v3", make_current=False)
    flaky.failing = {call}
    delays = []
    for _ in range(7):
        poll = poller.poll()
        seen += [brief(change) for change in poll.changes]
        assert [type(error) for error in poll.errors] == [RegistryUnavailable]
        delays.append(poll.next_poll_s)
    assert delays[:4] == [20.0, 40.0, 80.0, MAX_BACK_OFF_S]
    assert max(delays) == MAX_BACK_OFF_S
    flaky.failing = set()
    seen += news(poller)
    assert seen == [("current", "v1"), ("current", "v2"), ("published", "v3")]


def test_a_registry_made_anew_is_noticed(drafts: Drafts, poller: RegistryPoller, tmp_path: Path) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    news(poller)
    stored = drafts.registry._storage
    for name in stored.list():
        stored.delete(name)
    with pytest.raises(RegistryUnavailable, match="vanished"):
        drafts.registry.current()
    Drafts(DraftRegistry(f"memory:/{stored._root}"), tmp_path / "anew").publish("v9")
    assert news(poller) == [("current", "v9")]


def test_poll_s_is_checked(registry: DraftRegistry) -> None:
    with pytest.raises(ValueError, match="poll_s"):
        RegistryPoller(registry, 0.0)


def test_callbacks_may_fail(drafts: Drafts, registry: DraftRegistry) -> None:
    seen, errors = [], []

    def on_change(change: Change) -> None:
        seen.append(brief(change))
        raise RuntimeError("the server's fault")

    def on_error(error: Exception) -> None:
        errors.append(error)
        raise RuntimeError("this one too")

    watcher = RegistryWatcher(registry, 10.0, on_change, on_error)
    drafts.publish("v1")
    drafts.publish("v2", make_current=False)
    assert watcher.poll() == 10.0
    assert seen == [("current", "v1"), ("published", "v2")]
    assert [str(error) for error in errors] == ["the server's fault"] * 2
    assert watcher.poll() == 10.0
    assert len(seen) == 2


def test_a_fault_of_the_poller_is_reported_and_survived(registry: DraftRegistry) -> None:
    errors: list[Exception] = []
    watcher = RegistryWatcher(registry, 10.0, lambda _: None, errors.append)
    watcher._poller._registry = None  # type: ignore[assignment]
    assert watcher.poll() == MAX_BACK_OFF_S
    assert [type(error) for error in errors] == [AttributeError]


def test_the_thread_calls_back_and_stops(drafts: Drafts, registry: DraftRegistry) -> None:
    moved = threading.Event()
    watcher = RegistryWatcher(registry, 3600.0, lambda _: moved.set(), lambda _: None)
    assert watcher.stop(timeout=1.0)  # never started
    drafts.publish("v1")
    watcher = RegistryWatcher(registry, 3600.0, lambda _: moved.set(), lambda _: None)
    watcher.start()
    assert moved.wait(20.0)
    assert watcher.stop(timeout=20.0)  # although the next poll is an hour away
