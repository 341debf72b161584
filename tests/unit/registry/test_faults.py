"""A store that fails, fills up, vanishes, or a process that ends in the middle: nothing is half published."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import redraft.files
import redraft.registry.storage as storage_module
from redraft.registry.errors import (
    CorruptDraft,
    CurrentChanged,
    DraftNotFound,
    RegistryError,
    RegistryFull,
    RegistryUnavailable,
)
from redraft.registry.manifest import DraftState
from redraft.registry.storage import Storage
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import Drafts, FilesystemProxy, Killed, intercept


class Mortal:
    """Counts calls and ends the "process" at number `point`: from then on every call raises."""

    def __init__(self, point: int) -> None:
        self._point = point
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count >= self._point:
            raise Killed


def check_whole(url: str, before: set[str]) -> None:
    """What anybody sees after a crash: complete drafts only, and a CURRENT that names one of them."""
    registry = DraftRegistry(url)
    for entry in registry.list():
        assert registry.verify(entry.version) == entry.manifest
    assert before <= set(registry.versions())
    current = registry.current()
    assert current is None or registry.get(current.version).state is DraftState.PUBLISHED


def test_killed_at_each_request_to_an_object_store(tmp_path: Path) -> None:
    made = Drafts(DraftRegistry("memory://unused"), tmp_path)
    first, second = made.make("v0"), made.make("v1")
    for point in range(1, 100):
        url = f"memory://registry-{secrets.token_hex(8)}"
        DraftRegistry(url).publish(*first)
        registry = DraftRegistry(url)
        intercept(registry, Mortal(point))
        try:
            registry.publish(*second)
        except Killed:
            check_whole(url, {"v0"})
            assert DraftRegistry(url).publish(*second, expected_current="v0") == second[1]
            current = DraftRegistry(url).current()
            assert current is not None
            assert (current.version, current.history, current.generation) == ("v1", ("v0",), 2)
        else:
            assert point > 10
            return
    pytest.fail("publish never came to its end")


class _LosesReplies(FilesystemProxy):
    """Does what it is asked, and then fails as `after` says."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        if not callable(found) or name == "invalidate_cache":
            return found

        def call(*args: Any, **options: Any) -> Any:
            result = found(*args, **options)
            self._before(name)
            return result

        return call


def test_a_move_whose_reply_is_lost_is_made_once(memory_url: str, tmp_path: Path) -> None:
    """The second try finds the record there and recognises it as its own."""
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    drafts.publish("v0")
    other = DraftRegistry(memory_url)
    lost = []

    def lose_one(name: str) -> None:
        if name == "pipe_file" and not lost and other._storage.exists("moves/0000000002.json"):
            lost.append(name)
            raise ConnectionResetError

    drafts.registry._storage._filesystem = _LosesReplies(drafts.registry._storage._filesystem, lose_one)
    drafts.publish("v1", expected_current="v0")
    assert lost
    current = other.current()
    assert current is not None
    assert (current.version, current.generation) == ("v1", 2)


def test_a_short_outage_is_bridged_and_a_long_one_named(memory_url: str, tmp_path: Path) -> None:
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    drafts.publish("v1")
    failures = [ConnectionError("reset"), TimeoutError("slow")]

    def fail(_: str) -> None:
        if failures:
            raise failures.pop()

    intercept(drafts.registry, fail)
    assert drafts.registry.get("v1").version == "v1"
    assert not failures

    failures.extend(ConnectionError("secret-host") for _ in range(100))
    acts: tuple[Callable[[], object], ...] = (
        drafts.registry.current,
        drafts.registry.list,
        drafts.registry.versions,
        lambda: drafts.registry.get("v1"),
        lambda: drafts.registry.verify("v1"),
        lambda: drafts.registry.fetch("v1", tmp_path / "out"),
        lambda: drafts.publish("v2"),
        lambda: drafts.registry.activate("v1"),
        lambda: drafts.registry.rollback(reason="x"),
        lambda: drafts.registry.mark_rolled_back("v1", "x"),
        lambda: drafts.registry.prune(1),
        drafts.registry.pin,
    )
    for act in acts:
        with pytest.raises(RegistryUnavailable, match="cannot") as caught:
            act()
        assert "secret-host" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_exception_of_a_store_is_an_outage_and_our_own_mistake_is_not(memory_url: str) -> None:
    class VendorError(Exception):
        pass

    error: Exception = VendorError("x")

    def fail(_: str) -> None:
        raise error

    registry = DraftRegistry(memory_url)
    intercept(registry, fail)
    with pytest.raises(RegistryUnavailable, match="VendorError"):
        registry.current()
    error = TypeError("wrong argument")
    with pytest.raises(TypeError):
        registry.current()


@pytest.mark.parametrize("point", range(1, 12))
def test_vanishing_during_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """The directory goes away (an unmount) at the n-th file that `fetch` and `verify` look at."""
    url = tmp_path / "registry"
    drafts = Drafts(DraftRegistry(str(url)), tmp_path / "made")
    drafts.publish("v1")
    count = 0
    translated = Storage._translated

    def vanish(self: Storage, doing: str) -> Any:
        nonlocal count
        count += 1
        if count == point:
            shutil.rmtree(url)
        return translated(self, doing)

    monkeypatch.setattr(Storage, "_translated", vanish)
    problem: RegistryError | None = None
    try:
        drafts.registry.fetch("v1", tmp_path / "out")
    except RegistryError as error:
        problem = error
    monkeypatch.undo()
    if count < point:
        assert problem is None
    else:
        assert isinstance(problem, RegistryUnavailable)
        assert "vanished" in str(problem)
        assert not (tmp_path / "out").exists()
        for act in (drafts.registry.current, drafts.registry.list, lambda: drafts.publish("v2")):
            with pytest.raises(RegistryUnavailable, match="vanished"):
                act()
        assert not url.exists()  # and nothing is made in its place


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "registry")
    drafts = Drafts(DraftRegistry(url), tmp_path / "made")
    drafts.publish("v0")
    directory, manifest = drafts.make("v1")
    fsync = os.fsync
    messages: list[str] = []
    for point in range(1, 100):
        count = 0

        def full(descriptor: int, point: int = point) -> None:
            nonlocal count
            count += 1
            if count == point:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                drafts.registry.publish(directory, manifest)
            except RegistryFull as error:
                messages.append(str(error))
        check_whole(url, {"v0"})
        assert not list(Path(url).rglob("*.tmp"))
        if count < point:
            break
    assert len(messages) > 5
    assert all("no space left" in message for message in messages)
    assert DraftRegistry(url).get("v1").manifest == manifest


def test_no_space_where_a_draft_is_fetched_to(drafts: Drafts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts.publish("v1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(redraft.files.Path, "rename", full)
    with pytest.raises(RegistryFull, match="no space left for draft v1"):
        drafts.registry.fetch("v1", tmp_path / "cache" / "out")
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_a_draft_cannot_be_fetched_to(drafts: Drafts, tmp_path: Path) -> None:
    drafts.publish("v1")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RegistryError, match="cannot copy draft v1"):
        drafts.registry.fetch("v1", tmp_path / "file" / "out")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = Drafts(DraftRegistry(str(tmp_path / "registry")), tmp_path / "made")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage_module, "_write_local", denied)
    with pytest.raises(RegistryUnavailable, match="no permission to create"):
        drafts.publish("v1")


def test_no_such_bucket(memory_url: str, tmp_path: Path) -> None:
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)

    def missing(name: str) -> None:
        if name in ("pipe_file", "put_file"):
            raise FileNotFoundError("The specified bucket does not exist")

    intercept(drafts.registry, missing)
    with pytest.raises(RegistryUnavailable, match="bucket"):
        drafts.publish("v1")


def test_exactly_one_creates(url: str) -> None:
    first, second = Storage(url), Storage(url)
    first.create("moves/1", b"first")
    with pytest.raises(FileExistsError):
        second.create("moves/1", b"second")
    assert second.read("moves/1", 100) == b"first"
    assert list(first.list()) == ["moves/1"]  # no leftovers of the loser


def test_a_store_without_conditional_writes_still_refuses_what_exists(memory_url: str, tmp_path: Path) -> None:
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    filesystem = drafts.registry._storage._filesystem

    class Unconditional(FilesystemProxy):
        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
            if mode == "create":
                raise NotImplementedError
            filesystem.pipe_file(path, data)

    drafts.registry._storage._filesystem = Unconditional(filesystem, lambda _: None)
    drafts.publish("v1")
    with pytest.raises(CurrentChanged):
        drafts.publish("v2", expected_current=None)
    with pytest.raises(FileExistsError):
        drafts.registry._storage.create("registry.json", b"{}")
    assert filesystem.cat_file(drafts.registry._storage._path("registry.json")) != b"{}"


@pytest.mark.parametrize("point", range(1, 25))
def test_a_rival_at_any_moment_of_a_move(memory_url: str, tmp_path: Path, point: int) -> None:
    """Both publishers expect v0: whichever moves first wins, the other is told, and both drafts are whole."""
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    drafts.publish("v0")
    rival = DraftRegistry(memory_url)
    ours, theirs = drafts.make("v1"), drafts.make("v2")
    outcomes: list[str] = []
    count = 0

    def compete(_: str) -> None:
        nonlocal count
        count += 1
        if count == point:
            try:
                rival.publish(*theirs, expected_current="v0")
                outcomes.append("v2")
            except CurrentChanged:
                pass

    intercept(drafts.registry, compete)
    try:
        drafts.registry.publish(*ours, expected_current="v0")
        outcomes.append("v1")
    except CurrentChanged:
        pass
    assert len(outcomes) == 1
    current = rival.current()
    assert current is not None
    assert (current.version, current.generation) == (outcomes[0], 2)
    check_whole(memory_url, {"v0", "v1"})
    assert rival._storage.read("CURRENT", 10_000) == current.encode()  # the copy agrees


def test_pruned_while_it_is_fetched(memory_url: str, tmp_path: Path) -> None:
    drafts = Drafts(DraftRegistry(memory_url), tmp_path)
    for version in ("v1", "v2", "v3"):
        drafts.publish(version)
    drafts.registry.activate("v3")  # so nothing protects the first any more
    other = DraftRegistry(memory_url)

    def prune_at_first_read(name: str) -> None:
        if name == "size":
            other.prune(0)

    intercept(drafts.registry, prune_at_first_read)
    with pytest.raises((DraftNotFound, CorruptDraft)) as caught:
        drafts.registry.fetch("v1", tmp_path / "out")
    assert caught.type is DraftNotFound
    assert not (tmp_path / "out").exists()
