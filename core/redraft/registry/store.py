"""The draft registry: the one place where training leaves drafts and servers find them.

    registry = DraftRegistry("s3://bucket/drafts")       # or a directory
    registry.publish(directory, manifest)                # training: store it, make it current
    registry.current()                                   # server: which draft is meant to serve?
    registry.fetch(version, destination)                 # ... and its files, each hash checked
    registry.rollback(reason="...", expected_current=version)

Several processes may use one registry at the same time without a lock: see `redraft.registry.pointer` for how
CURRENT moves, and `redraft.registry.names` for the layout. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import EllipsisType

from redraft.registry.contents import check_directory
from redraft.registry.drafts import DraftFiles
from redraft.registry.errors import (
    CorruptDraft,
    CorruptRegistry,
    DraftNotFound,
    DraftWithdrawn,
    NoPreviousDraft,
    RegistryUnavailable,
    VersionTaken,
)
from redraft.registry.manifest import DraftEntry, DraftManifest, DraftState, DraftStatus
from redraft.registry.moves import check_expected, check_not_pinned, history_after, on_publish
from redraft.registry.names import DRAFTS, MARKER, REFUSED
from redraft.registry.pointer import Current, Pointer, Wanted
from redraft.registry.pruning import prune
from redraft.registry.storage import Storage

SCHEMA_VERSION = 1


class DraftRegistry:
    """Drafts under a directory or any fsspec URL; made there with the first draft.

    The constructor reads nothing and raises `ConfigError` for a URL that cannot be used. Everything else raises
    `RegistryUnavailable` when the store fails or has vanished, and may raise `CorruptDraft` or `CorruptRegistry`.
    `clock` gives Unix seconds. Methods may be called from any thread.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._storage = Storage(url)
        self._drafts = DraftFiles(self._storage)
        self._pointer = Pointer(self._storage, clock)
        self._clock = clock
        self._was_seen = False

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        return self._storage.shown_url

    # Reading

    def current(self) -> Current | None:
        """The draft that is meant to serve; None before the first."""
        self._open()
        found = self._pointer.read()
        if found is None:
            self._check_still_there()
        return found

    def versions(self) -> tuple[str, ...]:
        """All published versions, rolled back or not, unordered: one request, no manifest is read."""
        self._open()
        found = self._drafts.versions(DRAFTS)
        if not found:
            self._check_still_there()
        return found

    def refused_versions(self) -> tuple[str, ...]:
        """Those that the gate refused, unordered: one request, no manifest is read."""
        self._open()
        return self._drafts.versions(REFUSED)

    def list(self) -> list[DraftEntry]:
        """All drafts, the refused ones too, newest first. One whose manifest is damaged is left out and logged."""
        self._open()
        entries = [*self._drafts.read_all(DRAFTS), *self._drafts.read_all(REFUSED)]
        if not entries:
            self._check_still_there()
        return sorted(entries, key=lambda entry: (entry.manifest.created_unix_s, entry.version), reverse=True)

    def get(self, version: str) -> DraftEntry:
        """One draft. Raises `DraftNotFound`."""
        return self._find(version)[1]

    def verify(self, version: str) -> DraftManifest:
        """Read every file of a draft and compare its hash. Raises `DraftNotFound` or `CorruptDraft`."""
        area, entry = self._find(version)
        try:
            self._drafts.verify(area, entry.manifest)
        except CorruptDraft:
            self._find(version)  # the registry may have vanished, or the draft been pruned, as it was read
            raise
        return entry.manifest

    def fetch(self, version: str, destination: Path) -> Path:
        """Copy a draft's files to `destination`, which appears whole and verified or not at all; return it.

        A destination that already holds exactly this draft is left as it is. Raises `DraftNotFound`,
        `CorruptDraft`, or `RegistryError` if the destination is something else or cannot be written. Files that
        the manifest does not name are not copied.
        """
        area, entry = self._find(version)
        try:
            self._drafts.copy_to(area, entry.manifest, destination)
        except CorruptDraft:
            self._find(version)
            raise
        return destination

    # Adding

    def publish(
        self,
        directory: Path,
        manifest: DraftManifest,
        *,
        make_current: bool = True,
        expected_current: str | EllipsisType | None = ...,
    ) -> DraftManifest:
        """Store a draft and, with `make_current`, move CURRENT to it; return the manifest as stored.

        `expected_current` is the version that must be current for that (None: there must be none); by default
        whichever is. The same version with the same files may be published again: what was done is verified and
        the rest is done, and a draft that was current once and has been superseded is not brought back.

        Raises `CorruptDraft` or `UnsafeDraft` if `directory` is not what the manifest describes, `VersionTaken`,
        and `DraftWithdrawn` if it was rolled back since. If the draft is stored but CURRENT cannot be moved:
        `CurrentChanged` or `Pinned`.
        """
        stored, state = self._store(DRAFTS, directory, manifest, DraftState.PUBLISHED, "")
        if make_current:
            if state is not DraftState.PUBLISHED:
                raise DraftWithdrawn(f"draft {manifest.version} is {_words(state)}, so it is not made current again")
            self._pointer.move(lambda current: on_publish(current, manifest.version, expected_current))
        return stored

    def refuse(
        self, directory: Path, manifest: DraftManifest, reason: str, *, keep_weights: bool = True
    ) -> DraftManifest:
        """Keep a draft that did not pass the gate, with the reason, where no server looks; return its manifest.

        Without `keep_weights` the safetensors are left out, of the manifest too. May be repeated. Raises
        `CorruptDraft` or `UnsafeDraft` like `publish`, and `VersionTaken` if the version was published.
        """
        return self._store(REFUSED, directory, manifest, DraftState.REFUSED, reason, keep_weights=keep_weights)[0]

    # Moving CURRENT

    def activate(self, version: str, *, expected_current: str | None = None) -> Current:
        """Make a published draft the current and proven one, after verifying it; does nothing if it is both.

        `expected_current` is the version that must be current (None: any or none). Raises `DraftNotFound`,
        `CorruptDraft`, `DraftWithdrawn` if it was refused, rolled back (`reinstate` it first) or retired,
        `CurrentChanged` or `Pinned`.
        """
        self.verify(version)

        def decide(current: Current | None) -> Wanted | None:
            check_expected(current, expected_current if expected_current is not None else ...)
            self._check_published(version)
            if current is not None and current.version == version and not current.is_on_trial:
                return None
            check_not_pinned(current)
            return Wanted(version, history_after(current, version), pinned=False, reason="activated")

        return _existing(self._pointer.move(decide))

    def rollback(self, *, reason: str, expected_current: str | None = None) -> Current:
        """Mark the current draft as rolled back and bring back the one before it, after verifying that.

        Earlier drafts that were rolled back themselves, or pruned, are passed over. Anything automatic should
        give `expected_current`: two callers without it roll back twice. Raises `NoPreviousDraft`,
        `CorruptDraft` if the previous one is damaged, `CurrentChanged` or `Pinned`; CURRENT then stays.
        """
        self._open()
        first = self.current()
        left = first.version if first is not None else None

        def decide(current: Current | None) -> Wanted:
            check_expected(current, expected_current if expected_current is not None else left)
            check_not_pinned(current)
            history = self._usable_history(current)
            if current is None or not history:
                raise NoPreviousDraft("there is no earlier draft to roll back to")
            self.verify(history[-1])
            self._check_published(history[-1])
            self.mark_rolled_back(current.version, reason)
            proven = current.proven if current.is_on_trial else None  # else the earlier one is what somebody chose
            return Wanted(history[-1], history[:-1], pinned=False, reason=f"rolled back: {reason}", proven=proven)

        return _existing(self._pointer.move(decide))

    def pin(self, version: str | None = None) -> Current:
        """Keep CURRENT where it is, or move it to `version` and keep it there, until `unpin`.

        Raises `DraftNotFound` if nothing is current and no version is given, and what `activate` raises but
        `Pinned`.
        """
        if version is not None:
            self.verify(version)

        def decide(current: Current | None) -> Wanted | None:
            wanted = version or (current.version if current is not None else None)
            if wanted is None:
                raise DraftNotFound("no draft is current yet, so there is nothing to pin: name a version")
            if current is not None and current.version == wanted:
                return None if current.pinned else Wanted(wanted, current.history, pinned=True, reason="pinned")
            self._check_published(wanted)
            return Wanted(wanted, history_after(current, wanted), pinned=True, reason="pinned")

        self._open()
        return _existing(self._pointer.move(decide))

    def unpin(self) -> Current | None:
        """Let CURRENT move again; None if there is none."""

        def decide(current: Current | None) -> Wanted | None:
            if current is None or not current.pinned:
                return None
            return Wanted(current.version, current.history, pinned=False, reason="unpinned", proven=current.proven)

        self._open()
        return self._pointer.move(decide)

    # The state of single drafts

    def mark_rolled_back(self, version: str, reason: str) -> DraftEntry:
        """Say that a draft did worse in service than it promised, so that no replica tries it again.

        CURRENT does not move; the first reason stays. Raises `DraftNotFound`, and `DraftWithdrawn` for one that
        was never published.
        """
        return self._change_state(version, DraftState.PUBLISHED, DraftState.ROLLED_BACK, reason)

    def reinstate(self, version: str) -> DraftEntry:
        """Take back `mark_rolled_back`: an operator's decision. Raises like it."""
        return self._change_state(version, DraftState.ROLLED_BACK, DraftState.PUBLISHED, "")

    def prune(self, keep: int) -> tuple[str, ...]:
        """Delete all but the newest `keep` published and the newest `keep` refused drafts; return the deleted.

        Never the current draft (so never a pinned one), the proven one, nor the one before the current. Also deletes
        what killed processes left more than a day ago.
        """
        if keep < 0:
            raise ValueError(f"keep must be 0 or more, not {keep}")
        self._open()
        return prune(self._storage, self._drafts, self._pointer, keep, self._clock())

    # Inside

    def _open(self) -> None:
        """Look once whether there is a registry, and whether this code may touch it."""
        if self._was_seen:
            return
        try:
            data = self._storage.read(MARKER, 4096)
        except FileNotFoundError:
            return
        try:
            schema_version = json.loads(data)["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptRegistry(f"{MARKER} in {self.url} is damaged, or this is no draft registry") from error
        if schema_version != SCHEMA_VERSION:
            raise CorruptRegistry(f"the draft registry {self.url} was made by another redraft: update this one")
        self._was_seen = True

    def _check_still_there(self) -> None:
        """What was once a registry and is empty now was deleted, or a disk is no longer mounted."""
        if self._was_seen and not self._storage.exists(MARKER):
            raise RegistryUnavailable(f"the draft registry {self.url} has vanished")

    def _find(self, version: str) -> tuple[str, DraftEntry]:
        self._open()
        found = self._drafts.find(version)
        if found is None:
            self._check_still_there()
            raise DraftNotFound(f"the draft registry {self.url} has no version {version[:100]!r}")
        return found

    def _store(
        self,
        area: str,
        directory: Path,
        manifest: DraftManifest,
        state: DraftState,
        reason: str,
        *,
        keep_weights: bool = True,
    ) -> tuple[DraftManifest, DraftState]:
        """The manifest as stored and the state, whether it was stored now or before."""
        check_directory(directory, manifest.files)
        if not keep_weights:
            kept = {name: file for name, file in manifest.files.items() if not name.endswith(".safetensors")}
            manifest = manifest.model_copy(update={"files": kept})
        self._open()
        self._check_still_there()
        if not self._was_seen:
            with suppress(FileExistsError):
                self._storage.create(MARKER, f'{{"schema_version": {SCHEMA_VERSION}}}\n'.encode())
        if self._drafts.find(manifest.version) is None:
            status = DraftStatus(state=state, reason=reason[:4096], updated_unix_s=self._clock())
            with suppress(FileExistsError):  # another process published it in the meantime: compare, like below
                self._drafts.write(area, directory, manifest, status)
                self._open()
                return manifest, state
        found_area, entry = self._find(manifest.version)
        if found_area != area:
            raise VersionTaken(f"draft {manifest.version} is {_words(entry.state)} already")
        if not _same_draft(entry.manifest, manifest):
            raise VersionTaken(f"version {manifest.version} exists with other contents: give this draft a new version")
        self.verify(manifest.version)
        return entry.manifest, entry.state

    def _check_published(self, version: str) -> None:
        state = self.get(version).state
        if state is not DraftState.PUBLISHED:
            raise DraftWithdrawn(f"draft {version} is {_words(state)}, so it does not go into service")

    def _usable_history(self, current: Current | None) -> tuple[str, ...]:
        """Earlier drafts up to the last that may serve, or none."""
        history = current.history if current is not None else ()
        while history:
            found = self._drafts.find(history[-1])
            if found is not None and found[1].state is DraftState.PUBLISHED:
                return history
            history = history[:-1]
        return ()

    def _change_state(self, version: str, before: DraftState, after: DraftState, reason: str) -> DraftEntry:
        area, entry = self._find(version)
        if entry.state is after:
            return entry
        if entry.state is not before:
            raise DraftWithdrawn(f"draft {version} is {_words(entry.state)}")
        status = DraftStatus(state=after, reason=reason[:4096], updated_unix_s=self._clock())
        self._drafts.write_status(area, version, status)
        return DraftEntry(entry.manifest, status.state, status.reason, status.updated_unix_s)


def _same_draft(stored: DraftManifest, given: DraftManifest) -> bool:
    def identity(manifest: DraftManifest) -> tuple[object, ...]:
        return manifest.files, manifest.target_fingerprint, manifest.tokenizer_fingerprint

    return identity(stored) == identity(given)


def _existing(current: Current | None) -> Current:
    assert current is not None  # every decision above wants a version or raises
    return current


def _words(state: DraftState) -> str:
    return state.value.replace("_", " ")
