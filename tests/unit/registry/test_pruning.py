"""Pruning deletes what is old, never what serves or may have to serve again."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

import pytest

from redraft.registry.errors import DraftNotFound, DraftWithdrawn
from redraft.registry.manifest import DraftState
from redraft.registry.pruning import LEFTOVER_AGE_S
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import Drafts, Killed, intercept


def names(drafts: Drafts) -> set[str]:
    return {entry.version for entry in drafts.registry.list()}


def test_keeps_the_newest_the_current_and_the_previous(drafts: Drafts) -> None:
    for version in ("v1", "v2", "v3", "v4", "v5"):
        drafts.publish(version)
        drafts.refuse(f"r{version}")
    drafts.registry.activate("v2")  # previous: v5
    drafts.registry.activate("v1")  # previous: v2
    assert drafts.registry.prune(1) == ("v3", "v4", "rv1", "rv2", "rv3", "rv4")
    assert names(drafts) == {"v1", "v2", "v5", "rv5"}
    assert drafts.registry.prune(0) == ("v5", "rv5")
    for version in ("v1", "v2"):
        assert drafts.registry.verify(version)
        assert drafts.registry.get(version).state is DraftState.PUBLISHED
    assert drafts.registry.rollback(reason="x").version == "v2"
    with pytest.raises(DraftNotFound):
        drafts.registry.get("v3")
    assert not [name for name in drafts.registry._storage.list() if "/v3/" in name]


def test_a_pinned_draft_stays(drafts: Drafts) -> None:
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    drafts.registry.pin("v1")
    drafts.registry.prune(0)
    current = drafts.registry.current()
    assert current is not None
    assert (current.version, current.pinned) == ("v1", True)
    assert names(drafts) == {"v1", "v3"}


def test_a_pruned_version_may_be_published_again(drafts: Drafts) -> None:
    directory, manifest = drafts.make("v1")
    drafts.registry.publish(directory, manifest)
    drafts.publish("v2")
    drafts.publish("v3")
    drafts.registry.activate("v3")
    assert drafts.registry.prune(0) == ("v1",)
    drafts.registry.publish(directory, manifest, make_current=False)
    assert drafts.registry.activate("v1").version == "v1"


@pytest.mark.parametrize("point", range(30))
def test_an_activation_at_any_moment_of_pruning_gets_a_whole_draft_or_a_refusal(
    memory_url: str, tmp_path: Path, point: int
) -> None:
    """Both orders are allowed; CURRENT naming a deleted draft is not."""
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    other = DraftRegistry(memory_url)
    count = 0

    def activate_at_point(_: str) -> None:
        nonlocal count
        count += 1
        if count == point:
            with suppress(DraftNotFound, DraftWithdrawn):
                other.activate("v1")

    intercept(drafts.registry, activate_at_point)
    drafts.registry.prune(0)
    current = other.current()
    assert current is not None
    assert other.verify(current.version)
    assert other.get(current.version).state is DraftState.PUBLISHED


@pytest.mark.parametrize("point", range(40))
def test_pruning_at_any_moment_of_an_activation(memory_url: str, tmp_path: Path, point: int) -> None:
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    other = DraftRegistry(memory_url)
    count = 0

    def prune_at_point(_: str) -> None:
        nonlocal count
        count += 1
        if count == point:
            other.prune(0)

    intercept(drafts.registry, prune_at_point)
    with suppress(DraftNotFound, DraftWithdrawn):
        drafts.registry.activate("v1")
    current = other.current()
    assert current is not None
    assert other.verify(current.version)
    assert other.get(current.version).state is DraftState.PUBLISHED


def test_interrupted_anywhere_it_can_be_run_again(tmp_path: Path) -> None:
    for point in range(1, 100):
        url = f"memory://registry-{secrets.token_hex(8)}"
        drafts = Drafts(DraftRegistry(url), tmp_path / str(point))
        for version in ("v1", "v2", "v3", "v4"):
            drafts.publish(version)
        drafts.registry.activate("v4")
        drafts.refuse("r1")
        count = 0

        def die_at_point(_: str, point: int = point) -> None:
            nonlocal count
            count += 1
            if count >= point:
                raise Killed

        intercept(drafts.registry, die_at_point)
        try:
            drafts.registry.prune(0)
        except Killed:
            survivor = DraftRegistry(url, clock=lambda: 4e9)  # a day later: leftovers are old
            survivor.prune(0)
            assert {entry.version for entry in survivor.list()} == {"v3", "v4"}
            assert {name.split("/")[1] for name in survivor._storage.list("drafts")} == {"v3", "v4"}
            assert survivor._storage.list("refused") == {}
            continue
        assert point > 20
        return
    pytest.fail("pruning never came to its end")


def test_leftovers_go_after_a_day_and_not_before(drafts: Drafts, url: str) -> None:
    drafts.publish("v1")
    stored = drafts.registry._storage
    stored.put("drafts/v2/model.safetensors", b"half")
    stored.put("drafts/v1/.model.safetensors.ab12.tmp", b"half")
    written = stored.modified_unix_s("drafts/v2/model.safetensors")
    assert written is not None
    DraftRegistry(url, clock=lambda: written + LEFTOVER_AGE_S - 60).prune(5)
    assert "drafts/v2/model.safetensors" in stored.list()
    assert names(drafts) == {"v1"}  # no manifest, no draft
    DraftRegistry(url, clock=lambda: written + LEFTOVER_AGE_S + 60).prune(5)
    assert not [name for name in stored.list() if "v2" in name or name.endswith(".tmp")]
    assert drafts.registry.verify("v1")


def test_keep_is_checked(registry: DraftRegistry) -> None:
    with pytest.raises(ValueError, match="keep"):
        registry.prune(-1)
