"""Publish, move CURRENT, roll back and fetch, on a local directory and on an object store alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redraft.errors import ConfigError
from redraft.registry.errors import (
    CorruptDraft,
    CorruptRegistry,
    CurrentChanged,
    DraftNotFound,
    DraftWithdrawn,
    NoPreviousDraft,
    Pinned,
    RegistryError,
    VersionTaken,
)
from redraft.registry.manifest import DraftState
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import Drafts, make_draft, manifest_of


def current_version(registry: DraftRegistry) -> str | None:
    current = registry.current()
    return current.version if current is not None else None


def raw(registry: DraftRegistry, name: str, data: bytes) -> None:
    """Change a stored file behind the registry's back."""
    registry._storage.put(name, data)


def test_an_empty_registry(registry: DraftRegistry, tmp_path: Path) -> None:
    assert registry.current() is None
    assert registry.list() == []
    assert registry.versions() == ()
    assert registry.prune(0) == ()
    assert registry.unpin() is None
    assert not (tmp_path / "registry").exists()  # looking makes nothing
    for refused in (registry.get, registry.verify, registry.activate):
        with pytest.raises(DraftNotFound, match="v1"):
            refused("v1")
    with pytest.raises(DraftNotFound):
        registry.fetch("../v1", tmp_path / "out")
    with pytest.raises(NoPreviousDraft):
        registry.rollback(reason="x")
    with pytest.raises(DraftNotFound, match="nothing to pin"):
        registry.pin()


def test_publish_then_fetch_gives_the_same_bytes(drafts: Drafts, url: str, tmp_path: Path) -> None:
    directory, manifest = drafts.make("v1")
    assert drafts.registry.publish(directory, manifest) == manifest

    other = DraftRegistry(url)  # as another process sees it
    current = other.current()
    assert current is not None
    assert (current.version, current.previous, current.pinned, current.generation) == ("v1", None, False, 1)
    assert other.versions() == ("v1",)
    entry = other.get("v1")
    assert (entry.manifest, entry.state, entry.reason) == (manifest, DraftState.PUBLISHED, "")
    fetched = other.fetch("v1", tmp_path / "cache" / "v1")
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in directory.iterdir()
    }
    assert other.fetch("v1", fetched) == fetched  # there already: verified, left alone


def test_the_layout_is_the_documented_one(drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.refuse("v2", "no gain")
    stored = drafts.registry._storage
    files = ("config.json", "manifest.json", "model.safetensors", "status.json", "tokenizer.json")
    assert set(stored.list()) == {
        "registry.json",
        "CURRENT",
        "moves/0000000001.json",
        *(f"drafts/v1/{name}" for name in files),
        *(f"refused/v2/{name}" for name in files),
    }
    pointer = json.loads(stored.read("CURRENT", 10_000))
    assert (pointer["version"], pointer["previous"], pointer["pinned"], pointer["generation"]) == ("v1", None, False, 1)
    assert json.loads(stored.read("refused/v2/status.json", 10_000))["reason"] == "no gain"


def test_publishing_again_changes_nothing(drafts: Drafts) -> None:
    registry = drafts.registry
    directory, manifest = drafts.make("v1")
    registry.publish(directory, manifest)
    before = registry.current()
    again = manifest.model_copy(update={"training": {"note": "the same draft, by a resumed run"}})
    assert registry.publish(directory, again) == manifest  # what is stored counts
    assert registry.publish(directory, manifest, expected_current=None) == manifest  # what was expected then
    assert registry.current() == before


def test_a_superseded_draft_is_not_brought_back_by_publishing_again(drafts: Drafts) -> None:
    directory, manifest = drafts.make("v1")
    drafts.registry.publish(directory, manifest)
    drafts.publish("v2")
    drafts.registry.publish(directory, manifest)
    assert current_version(drafts.registry) == "v2"


def test_a_version_never_changes_its_contents(drafts: Drafts, tmp_path: Path) -> None:
    drafts.publish("v1")
    other = make_draft(tmp_path / "other", content="b")
    with pytest.raises(VersionTaken, match="other contents"):
        drafts.registry.publish(other, manifest_of(other, "v1"))
    same_files, manifest = drafts.make("v1", target_fingerprint="sha256:other")
    with pytest.raises(VersionTaken, match="other contents"):
        drafts.registry.publish(same_files, manifest)
    with pytest.raises(VersionTaken, match="published already"):
        drafts.refuse("v1")
    drafts.registry.verify("v1")


def test_a_manifest_that_lies_is_not_published(drafts: Drafts) -> None:
    directory, manifest = drafts.make("v1")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptDraft, match=r"model\.safetensors"):
        drafts.registry.publish(directory, manifest)
    assert drafts.registry.list() == []
    assert drafts.registry.current() is None


def test_refused_drafts_are_kept_aside_with_the_reason(drafts: Drafts, tmp_path: Path) -> None:
    registry = drafts.registry
    directory, manifest = drafts.make("v1")
    registry.refuse(directory, manifest, "domain sql loses 0.04")
    registry.refuse(directory, manifest, "the same again")
    entry = registry.get("v1")
    assert (entry.state, entry.reason) == (DraftState.REFUSED, "domain sql loses 0.04")
    assert registry.versions() == ()
    assert registry.current() is None
    registry.fetch("v1", tmp_path / "out")  # to look into what went wrong
    with pytest.raises(DraftWithdrawn, match="refused"):
        registry.activate("v1")
    with pytest.raises(DraftWithdrawn, match="refused"):
        registry.mark_rolled_back("v1", "x")
    with pytest.raises(VersionTaken, match="refused"):
        registry.publish(directory, manifest)


def test_refused_without_weights(drafts: Drafts) -> None:
    directory, manifest = drafts.make("v1")
    for _ in range(2):
        kept = drafts.registry.refuse(directory, manifest, "worse", keep_weights=False)
        assert sorted(kept.files) == ["config.json", "tokenizer.json"]
    assert drafts.registry.verify("v1") == kept


def test_newest_first(drafts: Drafts) -> None:
    drafts.publish("b")
    drafts.refuse("c")
    drafts.publish("a", make_current=False)
    assert [entry.version for entry in drafts.registry.list()] == ["a", "c", "b"]


def test_expected_current(drafts: Drafts) -> None:
    registry = drafts.registry
    drafts.publish("v1", expected_current=None)
    with pytest.raises(CurrentChanged, match="is v1, not none"):
        drafts.publish("v2", expected_current=None)
    drafts.publish("v3", expected_current="v1")
    with pytest.raises(CurrentChanged, match="is v3, not v1"):
        registry.activate("v2", expected_current="v1")
    assert registry.activate("v2", expected_current="v3").version == "v2"  # stored, although it lost then
    with pytest.raises(CurrentChanged):
        registry.rollback(reason="x", expected_current="v3")
    assert registry.get("v2").state is DraftState.PUBLISHED


def test_roll_back_goes_through_the_history_and_never_in_circles(drafts: Drafts) -> None:
    registry = drafts.registry
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    registry.activate("v2")
    current = registry.current()
    assert current is not None
    assert current.history == ("v1", "v3")
    assert registry.rollback(reason="slow", expected_current="v2").version == "v3"
    assert (registry.get("v2").state, registry.get("v2").reason) == (DraftState.ROLLED_BACK, "slow")
    after = registry.rollback(reason="slow too")
    assert (after.version, after.previous, after.reason) == ("v1", None, "rolled back: slow too")
    with pytest.raises(NoPreviousDraft):
        registry.rollback(reason="x")
    assert current_version(registry) == "v1"
    assert registry.get("v1").state is DraftState.PUBLISHED


def test_publishing_proves_nothing(drafts: Drafts) -> None:
    registry = drafts.registry

    def proven() -> tuple[str | None, bool]:
        current = registry.current()
        assert current is not None
        return current.proven, current.is_on_trial

    drafts.publish("v1")
    assert proven() == ("v1", False)  # there was nothing better
    drafts.publish("v2")
    drafts.publish("v3")
    assert proven() == ("v1", True)
    registry.prune(keep=1)
    assert set(registry.versions()) == {"v1", "v2", "v3"}  # proven, previous, current
    registry.rollback(reason="slow", expected_current="v3")
    assert (current_version(registry), proven()) == ("v2", ("v1", True))
    generation = registry.activate("v2").generation
    assert proven() == ("v2", False)
    assert registry.activate("v2").generation == generation
    registry.rollback(reason="slow after all", expected_current="v2")
    assert (current_version(registry), proven()) == ("v1", ("v1", False))


def test_roll_back_passes_over_what_was_rolled_back_elsewhere(drafts: Drafts) -> None:
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    drafts.registry.mark_rolled_back("v2", "degraded on another replica")
    assert drafts.registry.rollback(reason="x").version == "v1"


def test_roll_back_to_a_damaged_draft_is_refused(drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    raw(drafts.registry, "drafts/v1/model.safetensors", b"x" * 3000)
    with pytest.raises(CorruptDraft, match="v1"):
        drafts.registry.rollback(reason="x")
    assert current_version(drafts.registry) == "v2"
    assert drafts.registry.get("v2").state is DraftState.PUBLISHED


def test_a_rolled_back_draft_comes_back_only_by_hand(drafts: Drafts) -> None:
    registry = drafts.registry
    drafts.publish("v1")
    directory, manifest = drafts.make("v2")
    registry.publish(directory, manifest, make_current=False)
    registry.mark_rolled_back("v2", "first reason")
    assert registry.mark_rolled_back("v2", "second").reason == "first reason"
    with pytest.raises(DraftWithdrawn, match="rolled back"):
        registry.activate("v2")
    with pytest.raises(DraftWithdrawn, match="rolled back"):
        registry.publish(directory, manifest)
    with pytest.raises(DraftWithdrawn, match="rolled back"):
        registry.pin("v2")
    assert registry.reinstate("v2").state is DraftState.PUBLISHED
    assert registry.activate("v2").version == "v2"


def test_a_pinned_registry_does_not_move(drafts: Drafts) -> None:
    registry = drafts.registry
    drafts.publish("v1")
    drafts.publish("v2")
    assert registry.pin().pinned
    assert registry.pin().generation == 3  # pinned already
    moves = (
        lambda: drafts.publish("v3"),
        lambda: registry.activate("v1"),
        lambda: registry.rollback(reason="x"),
    )
    for move in moves:
        with pytest.raises(Pinned, match="pinned to draft v2: unpin"):
            move()
    assert registry.get("v3").state is DraftState.PUBLISHED  # stored all the same
    assert registry.get("v2").state is DraftState.PUBLISHED
    moved = registry.pin("v1")  # the operator's way
    assert (moved.version, moved.pinned, moved.previous) == ("v1", True, "v2")
    unpinned = registry.unpin()
    assert unpinned is not None
    assert not unpinned.pinned
    assert registry.activate("v3").previous == "v1"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"x" * 3000, "is not the file"), (b"a" * 2999, "2999 bytes instead of 3000"), (b"a" * 3001, "3001 bytes")],
)
def test_damage_in_the_store_is_noticed(drafts: Drafts, tmp_path: Path, data: bytes, message: str) -> None:
    registry = drafts.registry
    directory, manifest = drafts.make("v1")
    registry.publish(directory, manifest)
    raw(registry, "drafts/v1/model.safetensors", data)
    destination = tmp_path / "out"
    with pytest.raises(CorruptDraft, match=message):
        registry.verify("v1")
    with pytest.raises(CorruptDraft, match=r"model\.safetensors"):
        registry.fetch("v1", destination)
    assert not destination.exists()
    with pytest.raises(CorruptDraft):
        registry.activate("v1")
    with pytest.raises(CorruptDraft):
        registry.publish(directory, manifest)


def test_a_missing_file_is_noticed(drafts: Drafts, tmp_path: Path) -> None:
    drafts.publish("v1")
    drafts.registry._storage.delete("drafts/v1/tokenizer.json")
    for read in (drafts.registry.verify, lambda version: drafts.registry.fetch(version, tmp_path / "out")):
        with pytest.raises(CorruptDraft, match=r"misses tokenizer\.json"):
            read("v1")


def test_files_that_the_manifest_does_not_name_are_never_copied(drafts: Drafts, tmp_path: Path) -> None:
    drafts.publish("v1")
    raw(drafts.registry, "drafts/v1/pytorch_model.bin", b"cos\nsystem\n")
    assert drafts.registry.verify("v1")
    fetched = drafts.registry.fetch("v1", tmp_path / "out")
    assert sorted(path.name for path in fetched.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_fetch_never_overwrites(drafts: Drafts, tmp_path: Path) -> None:
    drafts.publish("v1")
    other = make_draft(tmp_path / "other", content="z")
    with pytest.raises(RegistryError, match="exists and is not draft v1"):
        drafts.registry.fetch("v1", other)
    assert (other / "model.safetensors").read_bytes() == b"z" * 3000


def test_a_damaged_manifest_is_skipped_by_list_and_named_by_get(
    drafts: Drafts, caplog: pytest.LogCaptureFixture
) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    raw(drafts.registry, "drafts/v2/manifest.json", b"{}")
    assert [entry.version for entry in drafts.registry.list()] == ["v1"]
    assert "v2" in caplog.text
    with pytest.raises(CorruptDraft, match="v2"):
        drafts.registry.get("v2")
    raw(drafts.registry, "drafts/v2/manifest.json", b" " * (2**20 + 1))
    with pytest.raises(CorruptDraft, match="larger"):
        drafts.registry.get("v2")


def test_a_damaged_move_is_named_and_its_removal_helps(drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    raw(drafts.registry, "moves/0000000002.json", b'{"version": "v2"')
    for act in (drafts.registry.current, lambda: drafts.publish("v3")):
        with pytest.raises(CorruptRegistry, match=r"moves/0000000002\.json.*delete it"):
            act()
    drafts.registry._storage.delete("moves/0000000002.json")
    assert current_version(drafts.registry) == "v1"


def test_a_newer_registry_is_left_alone(drafts: Drafts, url: str) -> None:
    drafts.publish("v1")
    raw(drafts.registry, "registry.json", b'{"schema_version": 2}')
    with pytest.raises(CorruptRegistry, match="update"):
        DraftRegistry(url).current()
    raw(drafts.registry, "registry.json", b"no")
    with pytest.raises(CorruptRegistry, match="no draft registry"):
        DraftRegistry(url).publish(*drafts.make("v2"))


def test_urls_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        DraftRegistry("nosuch://x")
    with pytest.raises(ConfigError, match="root"):
        DraftRegistry("/")
    assert "secret" not in DraftRegistry("memory://key:secret@bucket/x").url
